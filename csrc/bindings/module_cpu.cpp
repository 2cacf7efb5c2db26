// tvfast._C_cpu: addresses and numbers in, numbers out. Arguments were checked by tvfast.ops;
// nothing is computed here.
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/api.hpp"
#include "arguments.hpp"

namespace tvfast {
namespace {

Options to_options(const std::string& isa, int n_threads, std::int64_t tile) {
  return {isa, n_threads, tile};
}

}  // namespace
}  // namespace tvfast

PYBIND11_MODULE(_C_cpu, m) {
  using namespace tvfast;
  m.doc() = "C++ kernels of tvfast for the CPU";

  py::class_<Table>(m, "Table", py::module_local())
      .def(py::init([](int n_models) {
        auto table = std::make_unique<Table>();
        table->n_models = n_models;
        return table;
      }))
      .def("add", &add_entry);
  py::class_<Scalars>(m, "Scalars").def(py::init(&to_scalars));

  m.def("combine", [](const Table& table, const ProgramChoices& program, const Scalars& scalars,
                      const std::string& isa, int n_threads, std::int64_t tile) {
    const py::gil_scoped_release unlocked;
    combine(table, to_program(program), scalars, to_options(isa, n_threads, tile));
  });
  m.def("row_masks", [](const Table& table, const ProgramChoices& program, const Scalars& scalars,
                        unsigned wants, const std::string& isa, int n_threads, std::int64_t tile) {
    std::vector<Moments> moments;
    {
      const py::gil_scoped_release unlocked;
      moments =
          row_masks(table, to_program(program), scalars, wants, to_options(isa, n_threads, tile));
    }
    return to_python(moments);
  });
  m.def("score", [](const Table& table, const Scalars& scalars, const std::string& isa,
                    int n_threads, std::int64_t tile) {
    const py::gil_scoped_release unlocked;
    score(table, scalars, to_options(isa, n_threads, tile));
  });
  py::class_<FactoredScore>(m, "FactoredScore", py::module_local())
      .def(py::init(&to_factored_score));
  m.def("score_factored",
        [](const std::vector<FactoredScore>& scores, const std::string& isa, int n_threads) {
          const py::gil_scoped_release unlocked;
          score_factored(scores, to_options(isa, n_threads, 0));
        });
  py::class_<KroneckerProduct>(m, "KroneckerProduct", py::module_local())
      .def(py::init(&to_kronecker_product));
  m.def("kron",
        [](const std::vector<KroneckerProduct>& products, const std::string& isa, int n_threads) {
          const py::gil_scoped_release unlocked;
          return kron(products, to_options(isa, n_threads, 0));
        });
  py::class_<BinnedSum>(m, "ProductSum")
      .def(py::init())
      .def("add",
           [](BinnedSum& dot, const RowsTuple& x, const RowsTuple& product, const RowsTuple& out,
              std::int64_t n_rows, std::int64_t n_columns, float scale, bool accumulate,
              const std::string& isa, int n_threads) {
             const ProductPanel panel =
                 to_product_panel(x, product, out, n_rows, n_columns, scale, accumulate);
             const py::gil_scoped_release unlocked;
             finish_product(panel, dot, to_options(isa, n_threads, 0));
           })
      .def("value", &BinnedSum::value);
  m.attr("LARGEST_BLOCK") = kLargestBlock;
  m.def("measure", [](const Table& table, const ProgramChoices& program, const Scalars& scalars,
                      unsigned wants, const std::string& isa, int n_threads, std::int64_t tile) {
    std::vector<Moments> moments;
    {
      const py::gil_scoped_release unlocked;
      moments =
          measure(table, to_program(program), scalars, wants, to_options(isa, n_threads, tile));
    }
    return to_python(moments);
  });
  // Queries are (group, model, k), answers (value, n_greater, n_equal).
  m.def("thresholds", [](const Table& table, int keep, const std::vector<RankTuple>& asked,
                         const std::string& isa, int n_threads, std::int64_t tile) {
    const std::vector<RankQuery> queries = to_queries(asked);
    std::vector<Threshold> found;
    {
      const py::gil_scoped_release unlocked;
      found = thresholds(table, static_cast<Keep>(keep), queries, to_options(isa, n_threads, tile));
    }
    return to_python(found);
  });
  py::class_<ResumableSelection>(m, "ResumableSelection")
      .def(py::init([](int keep, const std::vector<RankTuple>& asked,
                       const std::vector<std::int64_t>& group_sizes) {
        return std::make_unique<ResumableSelection>(static_cast<Keep>(keep), to_queries(asked),
                                                    group_sizes);
      }))
      .def("sample",
           [](ResumableSelection& selection, const Table& part, const std::string& isa,
              int n_threads) {
             const py::gil_scoped_release unlocked;
             selection.sample(part, to_options(isa, n_threads, 0));
           })
      .def("guesses",
           [](ResumableSelection& selection, int n_threads) {
             std::vector<std::pair<float, bool>> result;
             for (const auto& [key, likely] : selection.guesses(to_options("", n_threads, 0)))
               result.emplace_back(std::bit_cast<float>(key), likely);
             return result;
           })
      .def("count",
           [](ResumableSelection& selection, const Table& part, const std::string& isa,
              int n_threads, std::int64_t tile) {
             const py::gil_scoped_release unlocked;
             selection.count(part, to_options(isa, n_threads, tile));
           })
      // None asks for another pass.
      .def("finish", [](ResumableSelection& selection) -> py::object {
        if (!selection.finish()) return py::none();
        return to_python(selection.answers());
      });
  py::class_<Accumulation>(m, "Accumulation")
      .def(py::init<std::size_t, int>())
      .def("measure",
           [](Accumulation& all, const Table& part, const ProgramChoices& program,
              const Scalars& scalars, unsigned wants, const std::vector<std::size_t>& rows,
              const std::string& isa, int n_threads, std::int64_t tile) {
             const py::gil_scoped_release unlocked;
             all.measure(part, to_program(program), scalars, wants, rows,
                         to_options(isa, n_threads, tile));
           })
      .def("finish", [](const Accumulation& all) { return to_python(all.moments()); });
  // Queries are (group, model, value), answers (n_greater, n_equal).
  m.def("verify", [](const Table& table, const std::vector<std::tuple<int, int, float>>& asked,
                     const std::string& isa, int n_threads, std::int64_t tile) {
    const std::vector<CountQuery> queries = to_queries(asked);
    const py::gil_scoped_release unlocked;
    std::vector<std::pair<std::int64_t, std::int64_t>> counts;
    for (const Threshold& t : verify(table, queries, to_options(isa, n_threads, tile)))
      counts.push_back({t.n_greater, t.n_equal});
    return counts;
  });
  // Queries are (group, model, value); counts are [entry * n_queries + query].
  m.def("count_equal", [](const Table& table, int keep,
                          const std::vector<std::tuple<int, int, float>>& asked,
                          const std::string& isa, int n_threads, std::int64_t tile) {
    const std::vector<CountQuery> queries = to_queries(asked);
    const py::gil_scoped_release unlocked;
    return count_equal(table, static_cast<Keep>(keep), queries, to_options(isa, n_threads, tile));
  });
  // Queries are (group, model, value, r).
  m.def("nth_equal", [](const Table& table, int keep,
                        const std::vector<std::tuple<int, int, float, std::int64_t>>& asked,
                        const std::string& isa, int n_threads, std::int64_t tile) {
    std::vector<EqualQuery> queries;
    for (const auto& [group, model, value, r] : asked)
      queries.push_back({group, model, key_of(value), r});
    const py::gil_scoped_release unlocked;
    return nth_equal(table, static_cast<Keep>(keep), queries, to_options(isa, n_threads, tile));
  });
  m.def("crc32c", [](Address address, std::size_t n_bytes, std::uint32_t seed) {
    const py::gil_scoped_release unlocked;
    return crc32c(reinterpret_cast<const void*>(address), n_bytes, seed);
  });
  m.def("crc32c_combine", &crc32c_combine);
  m.def("first_nonfinite", [](Address address, std::int64_t n, int dtype) {
    const py::gil_scoped_release unlocked;
    return first_nonfinite(reinterpret_cast<const void*>(address), n, static_cast<DType>(dtype));
  });
  m.def("isas", &isas);
  m.def("default_isa", &default_isa);
  m.def("available_threads", &available_threads);
}
