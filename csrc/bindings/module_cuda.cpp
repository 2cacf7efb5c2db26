// tvfast._C_cuda, and tvfast._C_simt, the host build of the same kernels: addresses of device
// memory and numbers in, numbers out. Arguments were checked by tvfast.ops; nothing is computed
// here.
#include <memory>
#include <string>
#include <vector>

#include "../cuda/api.hpp"
#include "arguments.hpp"

#ifndef TVFAST_MODULE
#error "TVFAST_MODULE is the name of the Python module"
#endif

namespace tvfast::gpu {
namespace {

Place to_place(int device, Address stream) { return {device, reinterpret_cast<void*>(stream)}; }

// Something packed on the host, and where its copy in device memory is.
template <class Packed>
struct Resident {
  Packed packed;
  const void* address = nullptr;

  auto at() const { return packed.at(address); }
  void upload(Address to, int device, Address stream) {
    const OnDevice current(device);
    address = reinterpret_cast<const void*>(to);
    copy_to_device(reinterpret_cast<void*>(to), packed.bytes().data(), packed.bytes().size(),
                   to_place(device, stream));
  }
};

using ResidentTable = Resident<PackedTable>;

struct ResidentScalars : Resident<PackedScalars> {
  Ends ends;
};

using ResidentRanks = Resident<RankPlan>;
using ResidentQueries = Resident<PackedQueries>;
using ResidentEquals = Resident<PackedEquals>;

SelectionLimits to_limits(const std::array<std::int64_t, 3>& limits) {
  return {limits[0], limits[1], limits[2]};
}

// A verb over a table and queries whose answers stay in the workspace.
template <auto verb, class Queries>
void run(const ResidentTable& table, const Queries& queries, Address workspace, int device,
         Address stream) {
  const py::gil_scoped_release unlocked;
  verb(table.at(), queries.packed, queries.address, reinterpret_cast<void*>(workspace),
       to_place(device, stream));
}

// What it left there, once the device is done.
template <auto read, class Queries>
auto answers(const Queries& queries, Address workspace, int device, Address stream) {
  const py::gil_scoped_release unlocked;
  return read(queries.packed, reinterpret_cast<void*>(workspace), to_place(device, stream));
}

template <class Class>
void define_resident(Class& type) {
  using T = typename Class::type;
  type.def_property_readonly("n_bytes", [](const T& self) { return self.packed.bytes().size(); })
      .def("upload", [](T& self, Address to, int device, Address stream) {
        const py::gil_scoped_release unlocked;
        self.upload(to, device, stream);
      });
}

}  // namespace
}  // namespace tvfast::gpu

PYBIND11_MODULE(TVFAST_MODULE, m) {
  using namespace tvfast;
  using namespace tvfast::gpu;
  m.doc() = "CUDA kernels of tvfast";
  py::register_exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError);

  py::class_<Table>(m, "Table", py::module_local())
      .def(py::init([](int n_models) {
        auto table = std::make_unique<Table>();
        table->n_models = n_models;
        return table;
      }))
      .def("add", &add_entry);

  py::class_<ResidentTable> table_type(m, "ResidentTable", py::module_local());
  table_type.def(py::init([](const Table& table, const std::vector<Address>& ranks) {
    std::vector<const std::uint32_t*> pointers;
    for (const Address address : ranks)
      pointers.push_back(reinterpret_cast<const std::uint32_t*>(address));
    return std::make_unique<ResidentTable>(ResidentTable{PackedTable(table, pointers), nullptr});
  }));
  define_resident(table_type);

  py::class_<ResidentScalars> scalars_type(m, "ResidentScalars", py::module_local());
  scalars_type.def(
      py::init([](const std::vector<TensorTuple>& tensors, const std::vector<ModelTuple>& models) {
        const Scalars scalars = to_scalars(tensors, models);
        return std::make_unique<ResidentScalars>(
            ResidentScalars{{PackedScalars(scalars), nullptr}, ends_of(scalars)});
      }));
  define_resident(scalars_type);

  m.def("combine", [](const ResidentTable& table, const ProgramChoices& program,
                      const ResidentScalars& scalars, int device, Address stream) {
    const py::gil_scoped_release unlocked;
    combine(table.at(), to_program(program), scalars.at(), scalars.ends, to_place(device, stream));
  });
  m.def("score",
        [](const ResidentTable& table, const ResidentScalars& scalars, int device, Address stream) {
          const py::gil_scoped_release unlocked;
          score(table.at(), scalars.at(), to_place(device, stream));
        });
  py::class_<FactoredScore>(m, "FactoredScore", py::module_local())
      .def(py::init(&to_factored_score));
  m.def("score_factored_workspace", &score_factored_workspace);
  m.def("score_factored",
        [](const FactoredScore& work, Address workspace, int device, Address stream) {
          const py::gil_scoped_release unlocked;
          score_factored(work, reinterpret_cast<void*>(workspace), to_place(device, stream));
        });
  py::class_<KroneckerProduct>(m, "KroneckerProduct", py::module_local())
      .def(py::init(&to_kronecker_product));
  m.def("kron_workspace", [](const KroneckerProduct& product, int device, Address stream) {
    return kron_workspace(product, to_place(device, stream));
  });
  m.def("kron", [](const KroneckerProduct& product, Address workspace, Address dot, int device,
                   Address stream) {
    const py::gil_scoped_release unlocked;
    kron(product, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(dot),
         to_place(device, stream));
  });
  m.def("finish_product", [](const RowsTuple& x, const RowsTuple& product, const RowsTuple& out,
                             std::int64_t n_rows, std::int64_t n_columns, float scale,
                             bool accumulate, Address dot, int device, Address stream) {
    const ProductPanel panel =
        to_product_panel(x, product, out, n_rows, n_columns, scale, accumulate);
    const py::gil_scoped_release unlocked;
    finish_product(panel, reinterpret_cast<void*>(dot), to_place(device, stream));
  });
  m.def("dot_value",
        [](Address host_copy) { return dot_value(reinterpret_cast<const void*>(host_copy)); });
  m.attr("DOT_BYTES") = kDotBytes;
  m.def("measure_workspace", &measure_workspace);
  m.def("measure", [](const ResidentTable& table, const ProgramChoices& program,
                      const ResidentScalars& scalars, unsigned wants, Address workspace, int device,
                      Address stream) {
    const py::gil_scoped_release unlocked;
    measure(table.at(), to_program(program), scalars.at(), wants,
            reinterpret_cast<void*>(workspace), to_place(device, stream));
  });
  // From a host copy of the workspace.
  m.def("moments", [](Address workspace, std::int64_t n_entries, int n_models) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(workspace);
    return to_python(
        moments({bytes, bytes + measure_workspace(n_entries, n_models)}, n_entries, n_models));
  });
  m.def("row_masks", [](const ResidentTable& table, const ProgramChoices& program,
                        const ResidentScalars& scalars, int device, Address stream) {
    const py::gil_scoped_release unlocked;
    row_masks(table.at(), to_program(program), scalars.at(), to_place(device, stream));
  });
  py::class_<ResidentRanks> ranks_type(m, "ResidentRanks", py::module_local());
  ranks_type
      .def(py::init([](const Table& table, int device, Address stream) {
        return ResidentRanks{rank_plan(table, to_place(device, stream)), nullptr};
      }))
      .def_property_readonly("n_workspace",
                             [](const ResidentRanks& plan) { return plan.packed.n_workspace; });
  define_resident(ranks_type);
  m.def("rank_rows", [](const ResidentTable& table, const ResidentRanks& plan, Address workspace,
                        int device, Address stream) {
    const py::gil_scoped_release unlocked;
    rank_rows(table.at(), plan.packed, plan.address, reinterpret_cast<void*>(workspace),
              to_place(device, stream));
  });

  const SelectionLimits usual;
  m.attr("LIMITS") = py::make_tuple(usual.small_group, usual.n_keys, usual.n_queries);
  py::class_<ResidentQueries> queries_type(m, "ResidentQueries", py::module_local());
  queries_type
      .def(py::init([](const Table& table, int keep, const std::vector<RankTuple>& queries,
                       const std::array<std::int64_t, 3>& limits) {
        return ResidentQueries{
            PackedQueries(table, static_cast<Keep>(keep), to_queries(queries), to_limits(limits)),
            nullptr};
      }))
      .def(
          py::init([](const Table& table, const std::vector<std::tuple<int, int, float>>& queries) {
            return ResidentQueries{PackedQueries(table, Keep::BAND, to_queries(queries)), nullptr};
          }))
      .def_property_readonly("n_workspace",
                             [](const ResidentQueries& q) { return q.packed.layout().total; })
      .def_property_readonly("n_batches",
                             [](const ResidentQueries& q) { return q.packed.batches().size(); });
  define_resident(queries_type);
  m.def("thresholds", &run<&thresholds, ResidentQueries>);
  m.def("verify", &run<&verify, ResidentQueries>);
  m.def("read_thresholds",
        [](const ResidentQueries& q, Address workspace, int device, Address stream) {
          return to_python(answers<&read_thresholds>(q, workspace, device, stream));
        });
  m.def("read_counts", [](const ResidentQueries& q, Address workspace, int device, Address stream) {
    return to_python(answers<&read_counts>(q, workspace, device, stream));
  });

  py::class_<ResidentEquals> equals_type(m, "ResidentEquals", py::module_local());
  equals_type
      .def(py::init([](const Table& table, int keep,
                       const std::vector<std::tuple<int, int, float, std::int64_t>>& asked,
                       bool by_entry) {
        std::vector<EqualQuery> queries;
        for (const auto& [group, model, value, r] : asked)
          queries.push_back({group, model, key_of(value), r});
        return ResidentEquals{PackedEquals(table, static_cast<Keep>(keep), queries, by_entry),
                              nullptr};
      }))
      .def_property_readonly("n_workspace",
                             [](const ResidentEquals& q) { return q.packed.layout().total; });
  define_resident(equals_type);
  m.def("count_equal", &run<&count_equal, ResidentEquals>);
  m.def("nth_equal", &run<&nth_equal, ResidentEquals>);
  m.def("read_equals", &answers<&read_equals, ResidentEquals>);
  m.def("read_positions",
        [](const ResidentEquals& q, Address workspace, int device, Address stream) {
          py::list found;
          for (const EqualAnswer& a : answers<&read_positions>(q, workspace, device, stream))
            found.append(py::make_tuple(a.position, a.n_equal));
          return found;
        });

  m.def("equals_of", [](const Table& table, const ResidentQueries& queries) {
    return ResidentEquals{equals_of(table, queries.packed), nullptr};
  });
  m.def("can_guess",
        [](const Table& table, const ProgramChoices& program, const ResidentScalars& scalars) {
          return can_guess(to_program(program), scalars.ends, table.n_models) &&
                 !overwrites_inputs(table);
        });
  m.def(
      "combine_trimmed",
      [](const ResidentTable& table, const ProgramChoices& program, const ResidentScalars& scalars,
         const ResidentQueries& queries, Address workspace, const ResidentEquals* equals,
         Address equals_workspace, bool guesses, int device, Address stream) {
        const py::gil_scoped_release unlocked;
        EqualPlaces places;
        if (equals != nullptr)
          places = {&equals->packed, const_cast<void*>(equals->address),
                    reinterpret_cast<void*>(equals_workspace)};
        combine_trimmed(table.at(), to_program(program), scalars.at(), scalars.ends, queries.packed,
                        queries.address, reinterpret_cast<void*>(workspace), places, guesses,
                        to_place(device, stream));
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg().none(true), py::arg(),
      py::arg(), py::arg(), py::arg());

  m.def("read_outcomes",
        [](const ResidentQueries& q, Address workspace, int device, Address stream) {
          std::vector<int> found;
          for (const Outcome outcome : answers<&read_outcomes>(q, workspace, device, stream))
            found.push_back(static_cast<int>(outcome));
          return found;
        });

  // Copies to the device, copies from it and waits for it, since the module was loaded.
  m.def("runtime_calls", [] {
    const RuntimeCalls calls = runtime_calls();
    return py::make_tuple(calls.to_device, calls.to_host, calls.waits);
  });
  m.def("architectures", &architectures);
  m.def("require", &require);
  m.def("device_name", [](int device) { return facts(device).name; });
}
