// What the modules of all devices take and return: addresses and numbers to tables, and back.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "../core/factored.hpp"
#include "../core/moments.hpp"
#include "../core/queries.hpp"
#include "../core/rows.hpp"
#include "../core/table.hpp"

namespace tvfast {

namespace py = pybind11;

using Address = std::uintptr_t;
using ViewArgument = std::pair<Address, int>;  // address, DType
using ScoreMapTuple = std::tuple<float, float, float>;
using ProgramChoices = std::array<int, 11>;

inline View to_view(const ViewArgument& argument) {
  return {reinterpret_cast<const void*>(argument.first), static_cast<DType>(argument.second)};
}

inline std::vector<View> to_views(const std::vector<ViewArgument>& arguments) {
  std::vector<View> views;
  for (const ViewArgument& argument : arguments) views.push_back(to_view(argument));
  return views;
}

inline void add_entry(Table& table, const ViewArgument& base,
                      const std::vector<ViewArgument>& models, const ViewArgument& out,
                      const std::vector<ViewArgument>& scores,
                      const std::vector<ScoreMapTuple>& score_maps,
                      const std::vector<Address>& masks, std::int64_t n, std::int64_t row,
                      std::int64_t offset, std::int64_t run, std::int64_t run_step, int group,
                      std::int64_t group_offset, bool task_vectors) {
  Entry entry;
  entry.base = to_view(base);
  entry.models = to_views(models);
  entry.out = reinterpret_cast<void*>(out.first);
  entry.out_dtype = static_cast<DType>(out.second);
  entry.scores = to_views(scores);
  for (const auto& [scale, shift, floor] : score_maps)
    entry.score_maps.push_back({scale, shift, floor});
  for (Address address : masks) entry.masks.push_back(reinterpret_cast<std::uint64_t*>(address));
  entry.n = n;
  entry.row = row;
  entry.offset = offset;
  entry.run = run;
  entry.run_step = run_step;
  entry.group = group;
  entry.group_offset = group_offset;
  entry.task_vectors = task_vectors;
  table.entries.push_back(std::move(entry));
}

inline Program to_program(const ProgramChoices& choices) {
  return {static_cast<Keep>(choices[0]),      static_cast<Tie>(choices[1]),
          static_cast<Gain>(choices[2]),      static_cast<Vote>(choices[3]),
          static_cast<Ballot>(choices[4]),    static_cast<ZeroSign>(choices[5]),
          static_cast<Members>(choices[6]),   static_cast<Reduce>(choices[7]),
          static_cast<Divisor>(choices[8]),   static_cast<Cross>(choices[9]),
          static_cast<Weighting>(choices[10])};
}

// Samples are (gradients, activations, n_tokens, weight).
using SampleTuple = std::tuple<ViewArgument, ViewArgument, std::int64_t, float>;

inline FactoredScore to_factored_score(const ViewArgument& model, const ViewArgument& base,
                                       Address out, std::int64_t n_out, std::int64_t n_in,
                                       bool bias_column, const std::vector<SampleTuple>& samples) {
  FactoredScore score;
  score.model = to_view(model);
  score.base = to_view(base);
  score.out = reinterpret_cast<float*>(out);
  score.n_out = n_out;
  score.n_in = n_in;
  score.bias_column = bias_column;
  for (const auto& [gradients, activations, n_tokens, weight] : samples)
    score.samples.push_back({to_view(gradients), to_view(activations), n_tokens, weight});
  return score;
}

// (blocks, side, block, packed)
using BlockDiagonalTuple = std::tuple<std::vector<ViewArgument>, std::int64_t, std::int64_t, bool>;

inline BlockDiagonal to_block_diagonal(const BlockDiagonalTuple& argument) {
  const auto& [blocks, side, block, packed] = argument;
  return {to_views(blocks), side, block, packed};
}

inline KroneckerProduct to_kronecker_product(const ViewArgument& x, const ViewArgument& out,
                                             std::int64_t n_out, std::int64_t n_in,
                                             const BlockDiagonalTuple& a,
                                             const BlockDiagonalTuple& b, float scale,
                                             bool accumulate) {
  return {to_view(x),
          reinterpret_cast<void*>(out.first),
          static_cast<DType>(out.second),
          n_out,
          n_in,
          to_block_diagonal(a),
          to_block_diagonal(b),
          scale,
          accumulate};
}

// (descriptor, offset, address where it stands in memory, dtype, rows, constants, out)
using RowSourceTuple = std::tuple<int, std::int64_t, Address, int, Address, Address, Address>;

inline RowGather to_row_gather(const std::vector<RowSourceTuple>& sources, Address fill, int dtype,
                               std::int64_t row, std::int64_t start, std::int64_t n) {
  RowGather gather{
      {}, reinterpret_cast<const std::int32_t*>(fill), static_cast<DType>(dtype), row, start, n};
  for (const auto& [descriptor, offset, shown, stored, rows, constants, out] : sources)
    gather.sources.push_back(
        {descriptor, offset, reinterpret_cast<const void*>(shown), static_cast<DType>(stored),
         reinterpret_cast<const std::int32_t*>(rows), reinterpret_cast<const void*>(constants),
         reinterpret_cast<void*>(out)});
  return gather;
}

// (address, dtype, elements from row to row)
using RowsTuple = std::tuple<Address, int, std::int64_t>;

inline ProductPanel to_product_panel(const RowsTuple& x, const RowsTuple& product,
                                     const RowsTuple& out, std::int64_t n_rows,
                                     std::int64_t n_columns, float scale, bool accumulate) {
  ProductPanel panel;
  panel.x = to_view({std::get<0>(x), std::get<1>(x)});
  panel.x_stride = std::get<2>(x);
  panel.product = reinterpret_cast<const float*>(std::get<0>(product));
  panel.product_stride = std::get<2>(product);
  panel.out = reinterpret_cast<void*>(std::get<0>(out));
  panel.out_dtype = static_cast<DType>(std::get<1>(out));
  panel.out_stride = std::get<2>(out);
  panel.n_rows = n_rows;
  panel.n_columns = n_columns;
  panel.scale = scale;
  panel.accumulate = accumulate;
  return panel;
}

using TensorTuple = std::tuple<float, float, float, float>;
using ModelTuple =
    std::tuple<float, float, float, float, std::uint64_t, std::uint64_t, std::uint64_t,
               std::uint64_t, float, float, std::int64_t, std::int64_t, std::uint64_t>;

inline Scalars to_scalars(const std::vector<TensorTuple>& tensors,
                          const std::vector<ModelTuple>& models) {
  Scalars scalars;
  for (const auto& [scale, majority, divisor_floor, divisor_fill] : tensors)
    scalars.tensors.push_back({scale, majority, divisor_floor, divisor_fill});
  for (const auto& [weight, gain, lo, hi, lo_cut, hi_cut, limit, limit_step, prob, prob_step,
                    rank_lo, rank_hi, key] : models)
    scalars.models.push_back({weight, gain, lo, hi, lo_cut, hi_cut, limit, limit_step, prob,
                              prob_step, rank_lo, rank_hi, key});
  return scalars;
}

inline std::uint32_t key_of(float value) {
  return std::min(std::bit_cast<std::uint32_t>(value) & 0x7fffffffu, kNanKey);
}

inline std::vector<double> values(const std::vector<BinnedSum>& sums) {
  std::vector<double> result;
  for (const BinnedSum& sum : sums) result.push_back(sum.value());
  return result;
}

inline py::list to_python(const std::vector<Moments>& all) {
  py::list result;
  for (const Moments& m : all)
    result.append(py::make_tuple(values(m.l1_before), values(m.l1), values(m.gram), m.n_kept,
                                 m.n_nonzero, m.n_nonfinite, m.n_base_nonfinite, m.elected,
                                 m.n_conflict, values(m.dots), m.n_alone));
  return result;
}

// A total of 128 bits in three parts that sums of 2^20 of them cannot overflow.
inline std::array<std::int64_t, 3> parts_of(Int128 total) {
  constexpr Int128 kMask = (Int128{1} << 42) - 1;
  return {static_cast<std::int64_t>(total & kMask), static_cast<std::int64_t>(total >> 42 & kMask),
          static_cast<std::int64_t>(total >> 84)};
}

// Accumulators as they are: (windows, six parts of each, non-finite sums, counts), entries and
// their fields one after the other.
inline py::tuple states_of(const std::vector<Moments>& all) {
  std::vector<int> windows;
  std::vector<std::int64_t> parts, counts;
  std::vector<double> nonfinite;
  for (const Moments& m : all) {
    for (const auto* sums : {&m.l1_before, &m.l1, &m.gram, &m.dots}) {
      for (const BinnedSum& sum : *sums) {
        windows.push_back(sum.window);
        nonfinite.push_back(sum.nonfinite);
        for (const Int128 total : {sum.high, sum.low})
          for (const std::int64_t part : parts_of(total)) parts.push_back(part);
      }
    }
    for (const auto* of_models : {&m.n_kept, &m.n_nonzero, &m.n_nonfinite, &m.n_alone})
      counts.insert(counts.end(), of_models->begin(), of_models->end());
    counts.insert(counts.end(), {m.n_base_nonfinite, m.elected, m.n_conflict});
  }
  return py::make_tuple(windows, parts, nonfinite, counts);
}

using PartitionTuple = std::tuple<int, int, std::vector<std::uint32_t>>;

inline std::vector<PartitionQuery> to_queries(const std::vector<PartitionTuple>& asked) {
  std::vector<PartitionQuery> queries;
  for (const auto& [group, model, edges] : asked) queries.push_back({group, model, edges});
  return queries;
}

using RankTuple = std::tuple<int, int, std::int64_t>;

inline std::vector<RankQuery> to_queries(const std::vector<RankTuple>& asked) {
  std::vector<RankQuery> queries;
  for (const auto& [group, model, k] : asked) queries.push_back({group, model, k});
  return queries;
}

inline py::list to_python(const std::vector<Threshold>& all) {
  py::list result;
  for (const Threshold& t : all)
    result.append(py::make_tuple(std::bit_cast<float>(t.key), t.n_greater, t.n_equal));
  return result;
}

inline std::vector<CountQuery> to_queries(const std::vector<std::tuple<int, int, float>>& asked) {
  std::vector<CountQuery> queries;
  for (const auto& [group, model, value] : asked) queries.push_back({group, model, key_of(value)});
  return queries;
}

}  // namespace tvfast
