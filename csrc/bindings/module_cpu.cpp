// tvfast._C_cpu: addresses and numbers in, numbers out. Arguments were checked by tvfast.ops;
// nothing is computed here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/api.hpp"

namespace py = pybind11;

namespace tvfast {
namespace {

using Address = std::uintptr_t;
using ViewArgument = std::pair<Address, int>;  // address, DType

View to_view(const ViewArgument& argument) {
  return {reinterpret_cast<const void*>(argument.first), static_cast<DType>(argument.second)};
}

std::vector<View> to_views(const std::vector<ViewArgument>& arguments) {
  std::vector<View> views;
  for (const ViewArgument& argument : arguments) views.push_back(to_view(argument));
  return views;
}

void add_entry(Table& table, const ViewArgument& base, const std::vector<ViewArgument>& models,
               const ViewArgument& out, const std::vector<ViewArgument>& scores,
               const std::vector<Address>& masks, std::int64_t n, std::int64_t row,
               std::int64_t offset, int group, std::int64_t group_offset) {
  Entry entry;
  entry.base = to_view(base);
  entry.models = to_views(models);
  entry.out = reinterpret_cast<void*>(out.first);
  entry.out_dtype = static_cast<DType>(out.second);
  entry.scores = to_views(scores);
  for (Address address : masks) entry.masks.push_back(reinterpret_cast<std::uint64_t*>(address));
  entry.n = n;
  entry.row = row;
  entry.offset = offset;
  entry.group = group;
  entry.group_offset = group_offset;
  table.entries.push_back(std::move(entry));
}

Program to_program(const std::array<int, 9>& choices) {
  return {static_cast<Keep>(choices[0]),    static_cast<Tie>(choices[1]),
          static_cast<Gain>(choices[2]),    static_cast<Vote>(choices[3]),
          static_cast<Ballot>(choices[4]),  static_cast<ZeroSign>(choices[5]),
          static_cast<Members>(choices[6]), static_cast<Reduce>(choices[7]),
          static_cast<Divisor>(choices[8])};
}

using TensorTuple = std::tuple<float, float, float, float>;
using ModelTuple =
    std::tuple<float, float, float, float, std::uint64_t, std::uint64_t, std::uint64_t,
               std::uint64_t, float, float, std::int64_t, std::int64_t, std::uint64_t>;

Scalars to_scalars(const std::vector<TensorTuple>& tensors, const std::vector<ModelTuple>& models) {
  Scalars scalars;
  for (const auto& [scale, majority, divisor_floor, divisor_fill] : tensors)
    scalars.tensors.push_back({scale, majority, divisor_floor, divisor_fill});
  for (const auto& [weight, gain, lo, hi, lo_cut, hi_cut, limit, limit_step, prob, prob_step,
                    rank_lo, rank_hi, key] : models)
    scalars.models.push_back({weight, gain, lo, hi, lo_cut, hi_cut, limit, limit_step, prob,
                              prob_step, rank_lo, rank_hi, key});
  return scalars;
}

Options to_options(const std::string& isa, int n_threads, std::int64_t tile) {
  return {isa, n_threads, tile};
}

std::uint32_t key_of(float value) {
  return std::min(std::bit_cast<std::uint32_t>(value) & 0x7fffffffu, kNanKey);
}

std::vector<double> values(const std::vector<BinnedSum>& sums) {
  std::vector<double> result;
  for (const BinnedSum& sum : sums) result.push_back(sum.value());
  return result;
}

py::list to_python(const std::vector<Moments>& all) {
  py::list result;
  for (const Moments& m : all)
    result.append(py::make_tuple(values(m.l1_before), values(m.l1), values(m.gram), m.n_kept,
                                 m.n_nonzero, m.n_nonfinite, m.n_base_nonfinite, m.elected,
                                 m.n_conflict));
  return result;
}

using RankTuple = std::tuple<int, int, std::int64_t>;

std::vector<RankQuery> to_queries(const std::vector<RankTuple>& asked) {
  std::vector<RankQuery> queries;
  for (const auto& [group, model, k] : asked) queries.push_back({group, model, k});
  return queries;
}

py::list to_python(const std::vector<Threshold>& all) {
  py::list result;
  for (const Threshold& t : all)
    result.append(py::make_tuple(std::bit_cast<float>(t.key), t.n_greater, t.n_equal));
  return result;
}

std::vector<CountQuery> to_queries(const std::vector<std::tuple<int, int, float>>& asked) {
  std::vector<CountQuery> queries;
  for (const auto& [group, model, value] : asked) queries.push_back({group, model, key_of(value)});
  return queries;
}

}  // namespace
}  // namespace tvfast

PYBIND11_MODULE(_C_cpu, m) {
  using namespace tvfast;
  m.doc() = "C++ kernels of tvfast for the CPU";

  py::class_<Table>(m, "Table")
      .def(py::init([](int n_models) {
        auto table = std::make_unique<Table>();
        table->n_models = n_models;
        return table;
      }))
      .def("add", &add_entry);
  py::class_<Scalars>(m, "Scalars").def(py::init(&to_scalars));

  m.def("combine", [](const Table& table, const std::array<int, 9>& program, const Scalars& scalars,
                      const std::string& isa, int n_threads, std::int64_t tile) {
    const py::gil_scoped_release unlocked;
    combine(table, to_program(program), scalars, to_options(isa, n_threads, tile));
  });
  m.def("row_masks",
        [](const Table& table, const std::array<int, 9>& program, const Scalars& scalars,
           const std::string& isa, int n_threads, std::int64_t tile) {
          const py::gil_scoped_release unlocked;
          row_masks(table, to_program(program), scalars, to_options(isa, n_threads, tile));
        });
  m.def("measure", [](const Table& table, const std::array<int, 9>& program, const Scalars& scalars,
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
           [](Accumulation& all, const Table& part, const std::array<int, 9>& program,
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
