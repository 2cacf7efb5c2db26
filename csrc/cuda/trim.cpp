// Trimmed merges: thresholds of a table and the merge with them, without a word from the host in
// between.
//
// With guesses, an entry is first merged with what the sample expects of its thresholds, and that
// pass counts what proves them. Entries whose guesses were right are done, after one read of the
// inputs; queries of the others are searched, and their entries merged again.
#include <algorithm>
#include <vector>

#include "api.hpp"
#include "packing.hpp"

namespace tvfast::gpu {

namespace {

struct Range {
  std::uintptr_t begin, end;
};

Range range_of(const void* data, DType dtype, std::int64_t n) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  return {begin, begin + static_cast<std::size_t>(n) * size_of(dtype)};
}

// Disjoint ascending ranges of what the outputs cover.
std::vector<Range> written(const Table& table) {
  std::vector<Range> outputs, covered;
  for (const Entry& entry : table.entries)
    if (entry.n > 0) outputs.push_back(range_of(entry.out, entry.out_dtype, entry.n));
  std::sort(outputs.begin(), outputs.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (const Range& out : outputs) {
    if (covered.empty() || covered.back().end < out.begin) covered.push_back(out);
    covered.back().end = std::max(covered.back().end, out.end);
  }
  return covered;
}

}  // namespace

bool overwrites_inputs(const Table& table) {
  const std::vector<Range> outputs = written(table);
  const auto is_written = [&](const View& view, std::int64_t n) {
    if (view.data == nullptr || n == 0) return false;
    const Range own = range_of(view.data, view.dtype, n);
    const auto after = std::partition_point(outputs.begin(), outputs.end(),
                                            [&](const Range& out) { return out.end <= own.begin; });
    return after != outputs.end() && after->begin < own.end;
  };
  return std::any_of(table.entries.begin(), table.entries.end(), [&](const Entry& entry) {
    return is_written(entry.base, entry.n) ||
           std::any_of(entry.models.begin(), entry.models.end(),
                       [&](const View& model) { return is_written(model, entry.n); });
  });
}

std::vector<Outcome> read_outcomes(const PackedQueries& queries, void* workspace, Place place) {
  const OnDevice current(place.device);
  std::vector<Outcome> outcomes(static_cast<std::size_t>(queries.n_entries()));
  copy_to_host(outcomes.data(), at_bytes<std::byte>(workspace, queries.layout().left),
               outcomes.size() * sizeof(Outcome), place);
  synchronize(place);
  return outcomes;
}

void combine_trimmed(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
                     Ends ends, const PackedQueries& queries, const void* at, void* workspace,
                     EqualPlaces equals, bool guesses, Place place) {
  const SelectionLayout& layout = queries.layout();
  const Verdicts& found = *at_bytes<Verdicts>(workspace, layout.verdicts);
  const auto* left = at_bytes<std::uint32_t>(workspace, layout.left);
  bracket(table, queries, at, workspace, guesses, place);
  if (guesses) {
    place_guesses(table, queries, at, workspace, scalars, place);
    combine_guessed(table, program, scalars, found, left,
                    {at_bytes<std::int32_t>(workspace, layout.row_queries),
                     at_bytes<Guess>(workspace, layout.guesses)},
                    place);
    settle(queries, at, workspace, place);
  }
  search(table, queries, at, workspace, place);
  place_thresholds(table, queries, at, workspace, equals, guesses, program.tie, scalars, place);
  combine_placed(table, program, scalars, ends, found, guesses ? left : nullptr, place);
}

}  // namespace tvfast::gpu
