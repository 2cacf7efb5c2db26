// Bands from thresholds that are still on the device, so that trimming and merging need no word
// from the host in between.
#include "api.hpp"
#include "packing.hpp"
#include "select.cuh"

namespace tvfast::gpu {

namespace {

struct Placing {
  const DeviceQuery* queries;
  const std::int32_t* first_queries;  // of each group
  const QueryState* states;
  const EqualAnswer* equals;  // of each query, for ties by index
  ModelScalars* models;
  Verdicts* verdicts;
  Guess* guesses;             // of each query, where entries are merged with them; otherwise none
  std::uint32_t* left;        // of each entry
  std::int32_t* row_queries;  // of each model of each entry
  std::int32_t n_queries;
  Keep keep;
  Tie tie;
};

// Of the keys that equal the threshold, those that belong to the k largest.
TVFAST_STAGE Count n_before(const DeviceQuery& query, const QueryState& state) {
  return static_cast<Count>(query.k) - state.n_greater;
}

// Asks for the first equal key that is not kept.
__global__ void __launch_bounds__(kThreads) ask_kernel(Placing p, DeviceEqual* equals) {
  const std::int64_t q = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (q >= p.n_queries) return;
  const QueryState& state = p.states[p.queries[q].place];
  equals[q].key = state.lo;
  equals[q].r = static_cast<std::int64_t>(n_before(p.queries[q], state));
}

// floor(part / whole * 2^32) for part < whole < 2^63.
TVFAST_STAGE std::uint64_t share_of_hashes(Count part, Count whole) {
  std::uint64_t share = 0;
  for (int bit = 0; bit < 32; ++bit) {
    part *= 2;
    share *= 2;
    if (part >= whole) {
      part -= whole;
      share += 1;
    }
  }
  return share;
}

TVFAST_STAGE std::uint64_t cut_of(const Placing& p, std::int32_t q, const DeviceEntry& entry) {
  const QueryState& state = p.states[p.queries[q].place];
  const Count n = n_before(p.queries[q], state);
  if (p.tie == Tie::GE || n >= state.n_equal) return kOpenCut;
  if (p.tie == Tie::HASH) return share_of_hashes(n, state.n_equal);
  const std::int64_t group_offset = entry.position - entry.offset;
  const std::int64_t cut = p.equals[q].position - group_offset;
  return cut > 0 ? static_cast<std::uint64_t>(cut) : 0;
}

TVFAST_STAGE void set_lower_end(ModelScalars& scalars, std::uint32_t key, std::uint64_t cut) {
  scalars.lo = from_bits(key);
  scalars.hi = from_bits(kInfinityKey);
  scalars.lo_cut = cut;
  scalars.hi_cut = 0;
}

// Bands of the guesses, one thread for each entry. One that has a query without a guess is left to
// the merge with the answers.
__global__ void __launch_bounds__(kThreads) place_guesses_kernel(DeviceTable table, Placing p) {
  const std::int64_t e = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (e >= table.n_entries) return;
  const std::int32_t group = table.entries[e].group;
  if (!all_likely(p.first_queries, p.queries, p.guesses, group)) {
    p.left[e] = static_cast<std::uint32_t>(Outcome::UNGUESSED);
    atomicOr(&p.verdicts->left, 1u);
    return;
  }
  atomicOr(&p.verdicts->tried, 1u);
  const std::int64_t row = e * table.n_models;
  for (std::int32_t k = 0; k < table.n_models; ++k) p.row_queries[row + k] = -1;
  for (std::int32_t q = p.first_queries[group]; q < p.first_queries[group + 1]; ++q) {
    const DeviceQuery& query = p.queries[q];
    if (p.states[query.place].open != 0) p.row_queries[row + query.model] = query.place;
    set_lower_end(p.models[row + query.model], p.guesses[query.place].key, kOpenCut);
  }
}

// One thread for each model of each entry.
__global__ void __launch_bounds__(kThreads) place_kernel(DeviceTable table, Placing p) {
  const std::int64_t at = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= std::int64_t{table.n_entries} * table.n_models) return;
  const DeviceEntry& entry = table.entries[at / table.n_models];
  const std::int32_t model =
      p.keep == Keep::VARIANCE ? 0 : static_cast<std::int32_t>(at % table.n_models);
  for (std::int32_t q = p.first_queries[entry.group]; q < p.first_queries[entry.group + 1]; ++q) {
    if (p.queries[q].model != model) continue;
    const std::uint32_t key = p.states[p.queries[q].place].lo;
    std::uint32_t& left = p.left[at / table.n_models];
    if (p.guesses != nullptr && left != static_cast<std::uint32_t>(Outcome::UNGUESSED) &&
        key != p.guesses[p.queries[q].place].key) {
      left = static_cast<std::uint32_t>(Outcome::WRONG);
      atomicOr(&p.verdicts->left, 1u);
    }
    if (key != kNanKey) {
      const std::uint64_t cut = cut_of(p, q, entry);
      set_lower_end(p.models[at], key, cut);
      if (key == kInfinityKey && cut != kOpenCut) atomicOr(&p.verdicts->both_ends, 1u);
      return;
    }
    // What is not NaN is dropped, infinities included.
    set_lower_end(p.models[at], kInfinityKey, 0);
    p.models[at].hi = -1.0f;
    atomicOr(&p.verdicts->both_ends, 1u);
    return;
  }
}

Placing placing_of(const PackedQueries& queries, const void* at, void* workspace, bool guesses,
                   const DeviceScalars& scalars) {
  const SelectionLayout& layout = queries.layout();
  Placing p;
  p.queries = at_bytes<DeviceQuery>(at, 0);
  p.first_queries = at_bytes<std::int32_t>(at, queries.first_queries_at());
  p.states = at_bytes<QueryState>(workspace, layout.states);
  p.equals = nullptr;
  p.models = const_cast<ModelScalars*>(scalars.models);
  p.verdicts = at_bytes<Verdicts>(workspace, layout.verdicts);
  p.guesses = guesses ? at_bytes<Guess>(workspace, layout.guesses) : nullptr;
  p.left = at_bytes<std::uint32_t>(workspace, layout.left);
  p.row_queries = at_bytes<std::int32_t>(workspace, layout.row_queries);
  p.n_queries = queries.n_queries();
  p.keep = queries.keep();
  p.tie = Tie::GE;
  return p;
}

std::int64_t n_blocks(std::int64_t n) { return (n + kThreads - 1) / kThreads; }

}  // namespace

void place_guesses(const DeviceTable& table, const PackedQueries& queries, const void* at,
                   void* workspace, const DeviceScalars& scalars, Place place) {
  const OnDevice current(place.device);
  launch(place_guesses_kernel, n_blocks(table.n_entries), kThreads, place, table,
         placing_of(queries, at, workspace, true, scalars));
}

void place_thresholds(const DeviceTable& table, const PackedQueries& queries, const void* at,
                      void* workspace, EqualPlaces equals, bool guesses, Tie tie,
                      const DeviceScalars& scalars, Place place) {
  const OnDevice current(place.device);
  Placing p = placing_of(queries, at, workspace, guesses, scalars);
  p.tie = tie;
  if (tie == Tie::INDEX) {
    p.equals = at_bytes<EqualAnswer>(equals.workspace, equals.queries->layout().answers);
    launch(ask_kernel, n_blocks(p.n_queries), kThreads, place, p,
           at_bytes<DeviceEqual>(equals.at, 0));
    nth_equal(table, *equals.queries, equals.at, equals.workspace, place);
  }
  launch(place_kernel, n_blocks(std::int64_t{table.n_entries} * table.n_models), kThreads, place,
         table, p);
}

}  // namespace tvfast::gpu
