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
  m.def("measure", [](const ResidentTable& table, const std::array<int, 9>& program,
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
  m.def("row_masks", [](const ResidentTable& table, const std::array<int, 9>& program,
                        const ResidentScalars& scalars, int device, Address stream) {
    const py::gil_scoped_release unlocked;
    row_masks(table.at(), to_program(program), scalars.at(), to_place(device, stream));
  });
  py::class_<RankPlan>(m, "RankPlan", py::module_local())
      .def(py::init([](const Table& table, int device, Address stream) {
        return rank_plan(table, to_place(device, stream));
      }))
      .def_readonly("n_bytes", &RankPlan::n_bytes);
  m.def("rank_rows", [](const ResidentTable& table, const RankPlan& plan, Address workspace,
                        int device, Address stream) {
    const py::gil_scoped_release unlocked;
    rank_rows(table.at(), plan, reinterpret_cast<void*>(workspace), to_place(device, stream));
  });
  m.def("architectures", &architectures);
  m.def("require", &require);
  m.def("device_name", [](int device) { return facts(device).name; });
}
