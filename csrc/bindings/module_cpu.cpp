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

// A thin factor: address, type, stride along the matrix, stride along the rank.
using FactorArgument = std::tuple<Address, int, std::int64_t, std::int64_t>;

LowRankSum to_low_rank_sum(const ViewArgument& matrix, const ViewArgument& out, std::int64_t first,
                           std::int64_t n_columns, std::int64_t rank, float factor,
                           const FactorArgument& left, std::int64_t left_first,
                           const FactorArgument& right) {
  LowRankSum sum;
  sum.matrix = to_view(matrix);
  sum.out = reinterpret_cast<void*>(out.first);
  sum.out_dtype = static_cast<DType>(out.second);
  sum.first = first;
  sum.n_columns = n_columns;
  sum.rank = rank;
  sum.factor = factor;
  sum.left = to_view({std::get<0>(left), std::get<1>(left)});
  sum.left_row = std::get<2>(left);
  sum.left_step = std::get<3>(left);
  sum.left_first = left_first;
  sum.right = to_view({std::get<0>(right), std::get<1>(right)});
  sum.right_column = std::get<2>(right);
  sum.right_step = std::get<3>(right);
  return sum;
}

ScaledBlocks to_scaled_blocks(int format, std::int64_t n_rows, std::int64_t n_columns,
                              std::int64_t block_rows, std::int64_t block_columns, int scale_type) {
  return {static_cast<Fp8>(format),          n_rows, n_columns, block_rows, block_columns,
          static_cast<ScaleType>(scale_type)};
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
                      unsigned look, const std::string& isa, int n_threads, std::int64_t tile) {
    const py::gil_scoped_release unlocked;
    return combine(table, to_program(program), scalars, to_options(isa, n_threads, tile), look);
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
      .def("states", [](const Accumulation& all) { return states_of(all.moments()); })
      .def("finish", [](const Accumulation& all) { return to_python(all.moments()); });
  // Queries are (group, model, edges); edges and answers are keys.
  m.def("partition", [](const Table& table, int keep, const std::vector<PartitionTuple>& asked,
                        const std::string& isa, int n_threads, std::int64_t tile) {
    const std::vector<PartitionQuery> queries = to_queries(asked);
    const py::gil_scoped_release unlocked;
    return partition(table, static_cast<Keep>(keep), queries, to_options(isa, n_threads, tile));
  });
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
  // Counts are [(entry * n_models + model) * 256 + octave].
  m.def("count_octaves",
        [](const Table& table, const std::string& isa, int n_threads, std::int64_t tile) {
          const py::gil_scoped_release unlocked;
          return count_octaves(table, to_options(isa, n_threads, tile));
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
  m.def("show_pages", [](Address at, std::size_t n_bytes, int descriptor, std::int64_t offset) {
    const py::gil_scoped_release unlocked;
    return show_pages(reinterpret_cast<void*>(at), n_bytes, descriptor, offset);
  });
  m.def("hide_pages", [](Address at, std::size_t n_bytes) {
    const py::gil_scoped_release unlocked;
    hide_pages(reinterpret_cast<void*>(at), n_bytes);
  });
  m.def("guard_pages", [](Address at, std::size_t n_bytes) {
    return guard_pages(reinterpret_cast<void*>(at), n_bytes);
  });
  m.def("lost_pages", &lost_pages);
  m.def("end_guard", &end_guard);
  py::class_<LowRankSum>(m, "LowRankSum").def(py::init(&to_low_rank_sum));
  m.def("add_low_rank",
        [](const LowRankSum& sum, std::int64_t begin, std::int64_t end, int n_threads) {
          const py::gil_scoped_release unlocked;
          add_low_rank(sum, begin, end, to_options("", n_threads, 0));
        });
  m.def("divergences",
        [](const ViewArgument& of, const ViewArgument& from, std::int64_t n_rows,
           std::int64_t length, double floor, Address out, Address importances, int n_threads) {
          const py::gil_scoped_release unlocked;
          divergences({to_view(of), to_view(from), n_rows, length, floor,
                       reinterpret_cast<double*>(out), reinterpret_cast<float*>(importances)},
                      to_options("", n_threads, 0));
        });
  m.def("fuse", [](const ViewArgument& of, const ViewArgument& from, std::int64_t n, float least,
                   float scale, Address importances, int n_threads) {
    const py::gil_scoped_release unlocked;
    fuse({to_view(of), to_view(from), least, scale, reinterpret_cast<float*>(importances)}, n,
         to_options("", n_threads, 0));
  });
  m.attr("MAGNITUDE_BINS") = kMagnitudeBins;
  m.def("magnitude_counts",
        [](const ViewArgument& values, std::int64_t n, Address counts, int n_threads) {
          const py::gil_scoped_release unlocked;
          magnitude_counts(to_view(values), n, reinterpret_cast<std::int64_t*>(counts),
                           to_options("", n_threads, 0));
        });
  m.def("drop_binned", [](const ViewArgument& values, std::int64_t n, Address limits,
                          std::uint64_t key, Address out, int n_threads) {
    const py::gil_scoped_release unlocked;
    drop_binned({to_view(values), reinterpret_cast<const std::uint32_t*>(limits), key,
                 reinterpret_cast<float*>(out)},
                n, to_options("", n_threads, 0));
  });
  py::class_<ScaledBlocks>(m, "ScaledBlocks").def(py::init(&to_scaled_blocks));
  m.def("widen_scaled",
        [](const ScaledBlocks& blocks, Address codes, Address scales, std::int64_t first_row,
           std::int64_t begin, std::int64_t end, Address out, int n_threads) {
          const py::gil_scoped_release unlocked;
          widen_scaled(blocks, reinterpret_cast<const void*>(codes),
                       reinterpret_cast<const void*>(scales), first_row, begin, end,
                       reinterpret_cast<float*>(out), to_options("", n_threads, 0));
        });
  m.def("narrow_scaled",
        [](const ScaledBlocks& blocks, Address values, std::int64_t begin, std::int64_t end,
           bool power_of_two, Address codes, Address scales, int n_threads) {
          const py::gil_scoped_release unlocked;
          narrow_scaled(blocks, reinterpret_cast<const float*>(values), begin, end, power_of_two,
                        reinterpret_cast<void*>(codes), reinterpret_cast<void*>(scales),
                        to_options("", n_threads, 0));
        });
  m.def("widen_fp8", [](Address codes, std::int64_t n, int format, Address out) {
    const py::gil_scoped_release unlocked;
    widen_fp8(reinterpret_cast<const void*>(codes), n, static_cast<Fp8>(format),
              reinterpret_cast<float*>(out));
  });
  m.def("narrow_fp8", [](Address values, std::int64_t n, int format, bool saturate, Address codes) {
    const py::gil_scoped_release unlocked;
    narrow_fp8(reinterpret_cast<const float*>(values), n, static_cast<Fp8>(format), saturate,
               reinterpret_cast<void*>(codes));
  });
  m.def("gather_rows", [](const std::vector<RowSourceTuple>& sources, Address fill, int dtype,
                          std::int64_t row, std::int64_t start, std::int64_t n) {
    const RowGather gather = to_row_gather(sources, fill, dtype, row, start, n);
    const py::gil_scoped_release unlocked;
    const RowFailure failure = gather_rows(gather);
    return std::tuple(failure.source, failure.code, failure.at);
  });
  m.def("add_rows", [](Address matrix, std::int64_t n_rows, std::int64_t row, Address sums) {
    const py::gil_scoped_release unlocked;
    add_rows(reinterpret_cast<const float*>(matrix), n_rows, row, reinterpret_cast<double*>(sums));
  });
  m.def("isas", &isas);
  m.def("default_isa", &default_isa);
  m.def("available_threads", &available_threads);
}
