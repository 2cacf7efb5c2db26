// Exact order statistics without sorting and without waiting for the device: sample, bracket, count
// and collect, finish, and a radix histogram where the sample misled.
//
// Each query carries a closed interval that should hold its answer; one pass over the table counts
// what is above the interval and at its ends and collects what lies inside, and the counts tell
// whether it did. The sample decides only how much is read, never the answer. All launches are made
// unconditionally; those that find no open query return at once.
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "api.hpp"
#include "packing.hpp"
#include "count.cuh"

namespace tvfast::gpu {

namespace {

constexpr int kSelectThreads = 512;

// Where line `line` of a query's sample begins among the keys of its group.
TVFAST_STAGE std::int64_t line_begin(const DeviceQuery& query, std::int64_t line) {
  const std::int64_t from = line * query.n / query.n_lines;
  const std::int64_t width = (line + 1) * query.n / query.n_lines - from;
  const U draw = mixed_index(static_cast<U>(line) * 0x7feb352du + 0x9e3779b9u);
  return from +
         static_cast<std::int64_t>((std::uint64_t{draw} * static_cast<std::uint64_t>(width)) >> 32);
}

__global__ void __launch_bounds__(kThreads) sample_kernel(DeviceTable table, DeviceSelection s) {
  for (std::int64_t at = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; at < s.batch.n_sample;
       at += std::int64_t{gridDim.x} * kThreads) {
    const std::int32_t q = last_not_after(s.batch.first, s.batch.last, at,
                                          [&](std::int32_t i) { return s.queries[i].sample_at; });
    const DeviceQuery& query = s.queries[q];
    const std::int64_t number = at - query.sample_at;
    const std::int64_t key_at =
        query.n_lines == 0 ? number : line_begin(query, number / kSampleLine);
    const std::int32_t m =
        last_not_after(s.first_members[query.group], s.first_members[query.group + 1], key_at,
                       [&](std::int32_t i) { return s.members[i].start; });
    const GroupMember& member = s.members[m];
    const DeviceEntry& entry = table.entries[member.entry];
    std::int64_t i = key_at - member.start;
    if (query.n_lines > 0) {
      // A line lies inside its entry; of a shorter one elements are taken again.
      const std::int64_t latest = entry.n > kSampleLine ? entry.n - kSampleLine : 0;
      const std::int64_t n = entry.n < kSampleLine ? entry.n : kSampleLine;
      i = (i < latest ? i : latest) + number % kSampleLine % n;
    }
    F x[kQuad];
    with_keep(s.keep, [&](auto keep) {
      load_ranked<decltype(keep)::value>(entry,
                                         table.models + std::int64_t{member.entry} * table.n_models,
                                         table.n_models, query.model, i, 1, false, x);
    });
    s.samples[at] = key_of(x[0]);
  }
}

TVFAST_STAGE QueryState bracketed(std::uint32_t lo, std::uint32_t hi) {
  QueryState state{};
  state.lo = lo;
  state.hi = hi;
  state.open = 1;
  return state;
}

TVFAST_STAGE QueryState answered(std::uint32_t key, Count n_greater, Count n_equal) {
  QueryState state{};
  state.lo = state.hi = key;
  state.n_greater = n_greater;
  state.n_equal = n_equal;
  return state;
}

TVFAST_STAGE QueryState searched(std::uint32_t lo, std::uint32_t hi, Count n_over) {
  QueryState state = bracketed(lo, hi);
  state.n_over = n_over;
  return state;
}

// An interval of values around the one expected at the query's rank of its sample; of a small group
// the sample is everything, and gives the answer.
__global__ void __launch_bounds__(kSelectThreads) bracket_kernel(DeviceSelection s) {
  const DeviceQuery& query = s.queries[s.batch.first + static_cast<std::int32_t>(blockIdx.x)];
  const double share = static_cast<double>(query.k) / static_cast<double>(query.n);
  const double size = query.n_sample, rank = share * size;
  const double deviation = sqrt(share * (1.0 - share) * size) + 1.0;
  const std::int64_t first = static_cast<std::int64_t>(floor(rank - kSampleWidth * deviation)),
                     last = static_cast<std::int64_t>(ceil(rank + kSampleWidth * deviation)),
                     nearest = static_cast<std::int64_t>(ceil(rank));
  Count ranks[3] = {static_cast<Count>(query.k), 0, 0};
  if (query.n_lines > 0) {
    ranks[0] = last < query.n_sample ? static_cast<Count>(last + 1) : 0;
    ranks[1] = first >= 0 ? static_cast<Count>(first + 1) : 0;
    ranks[2] = s.guesses == nullptr ? 0 : nearest < 1 ? 1 : static_cast<Count>(nearest);
  }
  Selected found[3];
  select_keys<kSelectThreads>(s.samples + query.sample_at, query.n_sample, 0u, kNanKey, ranks,
                              found);
  const auto finite = [](std::uint32_t key) { return key < kInfinityKey ? key : kInfinityKey; };
  QueryState state;
  Guess guess{};
  if (query.n_lines == 0) {
    const Selected& all = found[0];
    state = answered(all.key, all.n_greater, all.n_equal);
    guess = {all.key, all.key < kInfinityKey, all.n_greater, all.n_greater + all.n_equal};
  } else {
    // The ends compare as floats, so they are no NaN.
    state = bracketed(ranks[0] != 0 ? finite(found[0].key) : 0u,
                      ranks[1] != 0 ? finite(found[1].key) : kInfinityKey);
    if (s.guesses != nullptr) {
      const Selected& run = found[2];
      const double n_from = static_cast<double>(run.n_greater + run.n_equal);
      const double distance = kGuessWidth * deviation;
      // No key is below zero.
      const bool inside = rank - static_cast<double>(run.n_greater) >= distance &&
                          (run.key == 0 || n_from - rank >= distance);
      guess = {run.key, inside && run.key < kInfinityKey, 0, 0};
    }
  }
  if (threadIdx.x != 0) return;
  s.states[query.place] = state;
  if (s.guesses != nullptr) s.guesses[query.place] = guess;
  if (state.open != 0) atomicAdd(s.flags, 1u);
}

// Answers a query whose guess was right, by what the merge with it counted; where it was wrong the
// bracket ends beside it.
__global__ void __launch_bounds__(kThreads) settle_kernel(DeviceSelection s) {
  const std::int64_t q = s.batch.first + std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (q >= s.batch.last) return;
  const DeviceQuery& query = s.queries[q];
  QueryState& state = s.states[query.place];
  if (state.open == 0 || !all_likely(s.first_queries, s.queries, s.guesses, query.group)) return;
  const Guess guess = s.guesses[query.place];
  const Count k = static_cast<Count>(query.k);
  if (k <= guess.n_greater) {
    if (state.lo <= guess.key) state.lo = guess.key + 1;
    if (state.hi < state.lo) state.hi = state.lo;
  } else if (k > guess.n_from) {
    if (state.hi >= guess.key) state.hi = guess.key - 1;
    if (state.lo > state.hi) state.lo = state.hi;
  } else {
    state = answered(guess.key, guess.n_greater, guess.n_from - guess.n_greater);
    atomicAdd(s.flags, ~0u);
  }
}

// Brackets of one key each, for counting alone.
__global__ void __launch_bounds__(kThreads) given_kernel(DeviceSelection s) {
  const std::int64_t q = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (q == 0) *s.flags = 1;
  if (q >= s.batch.last) return;
  const std::uint32_t key = s.queries[q].key < kInfinityKey ? s.queries[q].key : kInfinityKey;
  s.states[s.queries[q].place] = bracketed(key, key);
}

// Answers a query from its counts and collected keys, or leaves it open with a range that holds the
// answer.
__global__ void __launch_bounds__(kSelectThreads) finish_kernel(DeviceSelection s) {
  const std::int32_t q = static_cast<std::int32_t>(blockIdx.x);
  const DeviceQuery& query = s.queries[s.batch.first + q];
  const QueryState found = s.states[query.place];
  if (found.open == 0) return;
  __syncthreads();
  const Count k = static_cast<Count>(query.k);
  QueryState next;
  if (k <= found.above_hi) {
    next = found.hi == kInfinityKey ? answered(kNanKey, 0, found.above_hi)
                                    : searched(found.hi + 1, kNanKey, 0);
  } else if (k <= found.from_hi) {
    next = answered(found.hi, found.above_hi, found.from_hi - found.above_hi);
  } else if (k <= found.from_hi + found.inside) {
    if (found.n_collected == found.inside && found.inside <= static_cast<Count>(query.n_keys)) {
      const Count rank[1] = {k - found.from_hi};
      Selected of_inside[1];
      select_keys<kSelectThreads>(s.keys + query.keys_at, static_cast<std::int64_t>(found.inside),
                                  found.lo + 1, found.hi - 1, rank, of_inside);
      const Selected& selected = of_inside[0];
      next = answered(selected.key, found.from_hi + selected.n_greater, selected.n_equal);
    } else {
      next = searched(found.lo + 1, found.hi - 1, found.from_hi);
    }
  } else if (k <= found.from_lo) {
    const Count n_greater = found.from_hi + found.inside;
    next = answered(found.lo, n_greater, found.from_lo - n_greater);
  } else {
    next = searched(0, found.lo - 1, found.from_lo);
  }
  if (next.open != 0)
    for (int bin = static_cast<int>(threadIdx.x); bin < kDigits; bin += kSelectThreads)
      s.bins[std::int64_t{q} * kDigits + bin] = 0;
  if (threadIdx.x != 0) return;
  s.states[query.place] = next;
  if (next.open != 0) atomicAdd(s.flags + 1, 1u);
}

// Counts the keys of every open query's range by their next digit.
__global__ void __launch_bounds__(kThreads, 2)
    histogram_kernel(DeviceTable table, DeviceSelection s, int pass) {
  __shared__ std::uint32_t bins[kDigits];
  if (s.flags[1 + pass] == 0) return;
  for (int bin = static_cast<int>(threadIdx.x); bin < kDigits; bin += kThreads) bins[bin] = 0;
  for (std::int64_t tile = s.batch.first_tile + blockIdx.x; tile < s.batch.end_tile;
       tile += gridDim.x) {
    const TileSpan span = span_of(table, tile);
    const QueryRange range = queries_of(s, table.entries[span.entry].group);
    for (std::int32_t q = range.first; q < range.last; ++q) {
      const QueryState& state = s.states[s.queries[q].place];
      if (state.open == 0) continue;
      const std::uint32_t lo = state.lo, hi = state.hi;
      const int shift = digit_shift(lo, hi);
      __syncthreads();
      with_keep(s.keep, [&](auto keep) {
        for_each_ranked<decltype(keep)::value>(table, span, s.queries[q].model,
                                               [&](std::int64_t, int n, const F* x) {
#pragma unroll
                                                 for (int e = 0; e < kQuad; ++e) {
                                                   const std::uint32_t key = key_of(x[e]);
                                                   if (e < n && key >= lo && key <= hi)
                                                     atomicAdd(&bins[(key - lo) >> shift], 1u);
                                                 }
                                               });
      });
      __syncthreads();
      Count* all = s.bins + std::int64_t{q - s.batch.first} * kDigits;
      for (int bin = static_cast<int>(threadIdx.x); bin < kDigits; bin += kThreads) {
        if (bins[bin] != 0) atomicAdd(&all[bin], Count{bins[bin]});
        bins[bin] = 0;
      }
    }
  }
}

__global__ void __launch_bounds__(kSelectThreads) choose_kernel(DeviceSelection s, int pass) {
  if (s.flags[1 + pass] == 0) return;
  const std::int32_t q = static_cast<std::int32_t>(blockIdx.x);
  const DeviceQuery& query = s.queries[s.batch.first + q];
  const QueryState state = s.states[query.place];
  if (state.open == 0) return;
  Count* bins = s.bins + std::int64_t{q} * kDigits;
  const Digit digit =
      choose_digit<kSelectThreads>(bins, static_cast<Count>(query.k) - state.n_over);
  for (int bin = static_cast<int>(threadIdx.x); bin < kDigits; bin += kSelectThreads) bins[bin] = 0;
  if (threadIdx.x != 0) return;
  const int shift = digit_shift(state.lo, state.hi);
  const std::uint32_t lo = state.lo + (digit.value << shift);
  const std::uint32_t last = lo + ((1u << shift) - 1u);
  const Count n_over = state.n_over + digit.n_above;
  s.states[query.place] = shift == 0 ? answered(lo, n_over, digit.n_equal)
                                     : searched(lo, last < state.hi ? last : state.hi, n_over);
  if (shift != 0 && pass + 1 < kRadixPasses) atomicAdd(s.flags + 2 + pass, 1u);
}

DeviceSelection selection_of(const PackedQueries& queries, std::size_t batch, const void* at,
                             void* workspace, bool guesses = false) {
  const SelectionLayout& layout = queries.layout();
  DeviceSelection s;
  s.queries = at_bytes<DeviceQuery>(at, 0);
  s.members = at_bytes<GroupMember>(at, queries.members_at());
  s.first_queries = at_bytes<std::int32_t>(at, queries.first_queries_at());
  s.first_members = at_bytes<std::int32_t>(at, queries.first_members_at());
  s.states = at_bytes<QueryState>(workspace, layout.states);
  s.guesses = guesses ? at_bytes<Guess>(workspace, layout.guesses) : nullptr;
  s.flags = at_bytes<std::uint32_t>(workspace, layout.flags) + batch * (kRadixPasses + 1);
  s.bins = at_bytes<Count>(workspace, layout.bins);
  s.samples = at_bytes<std::uint32_t>(workspace, layout.samples);
  s.keys = at_bytes<std::uint32_t>(workspace, layout.keys);
  s.batch = queries.batches()[batch];
  s.keep = queries.keep();
  return s;
}

// Starts a kernel over n pieces of work: as many blocks as run at once, or one a piece.
template <class... Parameters, class... Arguments>
void launch_over(std::int64_t n, void (*kernel)(Parameters...), Place place,
                 Arguments... arguments) {
  launch(kernel, std::min(n, blocks_at_once(kernel, kThreads, place)), kThreads, place,
         arguments...);
}

std::int64_t n_tiles(const DeviceSelection& s) { return s.batch.end_tile - s.batch.first_tile; }

void count_tiles(const DeviceTable& table, const DeviceSelection& s, Place place) {
  const auto kernel = s.keep == Keep::BAND    ? count_kernel<Keep::BAND>
                      : s.keep == Keep::SCORE ? count_kernel<Keep::SCORE>
                                              : count_kernel<Keep::VARIANCE>;
  launch_over(n_tiles(s), kernel, place, table, s);
}

void clear_flags(const PackedQueries& queries, void* workspace, Place place) {
  const SelectionLayout& layout = queries.layout();
  fill_zero(at_bytes<std::byte>(workspace, layout.flags), layout.bins - layout.flags, place);
}

}  // namespace

void bracket(const DeviceTable& table, const PackedQueries& queries, const void* at,
             void* workspace, bool guesses, Place place) {
  const OnDevice current(place.device);
  clear_flags(queries, workspace, place);
  for (std::size_t batch = 0; batch < queries.batches().size(); ++batch) {
    const DeviceSelection s = selection_of(queries, batch, at, workspace, guesses);
    launch_over((s.batch.n_sample + kThreads - 1) / kThreads, sample_kernel, place, table, s);
    launch(bracket_kernel, s.batch.last - s.batch.first, kSelectThreads, place, s);
  }
}

void settle(const PackedQueries& queries, const void* at, void* workspace, Place place) {
  const OnDevice current(place.device);
  for (std::size_t batch = 0; batch < queries.batches().size(); ++batch) {
    const DeviceSelection s = selection_of(queries, batch, at, workspace, true);
    launch(settle_kernel, (s.batch.last - s.batch.first + kThreads - 1) / kThreads, kThreads, place,
           s);
  }
}

void search(const DeviceTable& table, const PackedQueries& queries, const void* at, void* workspace,
            Place place) {
  const OnDevice current(place.device);
  for (std::size_t batch = 0; batch < queries.batches().size(); ++batch) {
    const DeviceSelection s = selection_of(queries, batch, at, workspace);
    const std::int64_t n_queries = s.batch.last - s.batch.first;
    count_tiles(table, s, place);
    launch(finish_kernel, n_queries, kSelectThreads, place, s);
    for (int pass = 0; pass < kRadixPasses; ++pass) {
      launch_over(n_tiles(s), histogram_kernel, place, table, s, pass);
      launch(choose_kernel, n_queries, kSelectThreads, place, s, pass);
    }
  }
}

void thresholds(const DeviceTable& table, const PackedQueries& queries, const void* at,
                void* workspace, Place place) {
  bracket(table, queries, at, workspace, false, place);
  search(table, queries, at, workspace, place);
}

void verify(const DeviceTable& table, const PackedQueries& queries, const void* at, void* workspace,
            Place place) {
  if (queries.n_queries() == 0) return;
  const OnDevice current(place.device);
  const DeviceSelection s = selection_of(queries, 0, at, workspace);
  launch(given_kernel, (queries.n_queries() + kThreads - 1) / kThreads, kThreads, place, s);
  count_tiles(table, s, place);
}

namespace {

std::vector<QueryState> states_of(const PackedQueries& queries, void* workspace, Place place) {
  const OnDevice current(place.device);
  std::vector<QueryState> states(queries.n_queries());
  copy_to_host(states.data(), at_bytes<QueryState>(workspace, queries.layout().states),
               states.size() * sizeof(QueryState), place);
  synchronize(place);
  return states;
}

}  // namespace

std::vector<Threshold> read_thresholds(const PackedQueries& queries, void* workspace, Place place) {
  std::vector<Threshold> answers;
  for (const QueryState& s : states_of(queries, workspace, place))
    answers.push_back(
        {s.lo, static_cast<std::int64_t>(s.n_greater), static_cast<std::int64_t>(s.n_equal)});
  return answers;
}

std::vector<Threshold> read_counts(const PackedQueries& queries, void* workspace, Place place) {
  const std::vector<QueryState> states = states_of(queries, workspace, place);
  std::vector<Threshold> answers(states.size());
  for (const DeviceQuery& query : queries.queries()) {
    const QueryState& s = states[query.place];
    const auto above = static_cast<std::int64_t>(s.above_hi);
    answers[query.place] =
        query.key == kNanKey
            ? Threshold{kNanKey, 0, above}
            : Threshold{query.key, above, static_cast<std::int64_t>(s.from_hi) - above};
  }
  return answers;
}

}  // namespace tvfast::gpu
