// measure and row_masks: sums, counts, votes and bit planes of every entry of a table.
#include <algorithm>

#include "api.hpp"
#include "keeping.cuh"
#include "measure_plan.hpp"
#include "sums.cuh"
#include "tiles.cuh"

namespace tvfast::gpu {

namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kMeasureBlocksPerMultiprocessor = 2;

// Elements of a tile that are gone through for one sum after the other: with 32 elements a thread,
// joining a warp costs a fifth of adding; the tensors' parts stay in the first-level cache.
constexpr std::int64_t kMeasureSpan = kTile / 2;

// Sums that one launch keeps in shared memory, for each warp.
constexpr int kSumsOfLaunch = 64;

// Where the statistics of all entries are gathered; zero before the launch.
struct Gathered {
  unsigned long long* limbs;   // [n_entries][S][kWindows][kLimbs]
  double* nonfinite;           // [n_entries][S]
  unsigned* used;              // [n_entries][S], a bit for each window
  unsigned long long* counts;  // [n_entries][C]
};

// What one thread knows of the entry that it measures.
struct Measured {
  const Program& program;
  const DeviceEntry& entry;
  const DeviceModel* models;
  const ModelScalars* scalars;
  int n_models;
  F divisor_floor;
};

struct TauQuad {
  F tau[kQuad];   // d_k
  F kept[kQuad];  // d_k where kept, otherwise +0
  M is_kept[kQuad];
  U ranks[kQuad];
};

TVFAST_STAGE void load_tau(const Measured& m, int k, const Quad& quad, F* tau) {
  load_quad(m.models[k].model, quad.i, quad.n, quad.whole, tau);
  if (!m.entry.subtracts) return;
  F base[kQuad];
  load_quad(m.entry.base, quad.i, quad.n, quad.whole, base);
#pragma unroll
  for (int e = 0; e < kQuad; ++e) tau[e] = tau[e] - base[e];
}

TVFAST_STAGE void load_kept(const Measured& m, int k, const Quad& quad, TauQuad& t) {
  load_tau(m, k, quad, t.tau);
  KeptBy by;
  if (m.program.keep == Keep::VARIANCE)
    variance_quad(
        m.n_models, [&](int other, F* tau) { load_tau(m, other, quad, tau); }, by.variance);
  if (m.program.keep == Keep::SCORE)
    load_crossed(m.program, m.scalars, m.models, m.n_models, k, quad, by.score);
  if (uses_ranks(m.program.keep)) load_ranks(m.models[k], quad, by.ranks);
  keep_quad(m.program, m.scalars[k], m.models[k], quad, by, t.tau, t.is_kept);
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    t.is_kept[e] = t.is_kept[e] && e < quad.n;
    t.kept[e] = masked(t.is_kept[e], t.tau[e]);
    t.ranks[e] = uses_ranks(m.program.keep) ? by.ranks[e] : 0u;
  }
}

TVFAST_STAGE M is_finite(F x) { return (bits(x) & 0x7f800000u) != 0x7f800000u; }

// fn(quad) for this thread's quads of a span, and for single elements around them.
template <class Fn>
TVFAST_STAGE void for_each(const DeviceEntry& entry, const TileSpan& span, std::int64_t from,
                           Fn&& fn) {
  const auto call = [&](std::int64_t i, int n, bool whole) {
    fn(Quad{i, static_cast<std::uint64_t>(entry.offset + i), n, whole});
  };
  const std::int64_t to = from + kMeasureSpan < span.body_end ? from + kMeasureSpan : span.body_end;
  // One call of `fn` in the code, for quads and edges alike: it is long.
  const int before = from == span.body ? static_cast<int>(span.body - span.begin) : 0;
  const int after = from == span.body ? static_cast<int>(span.end - span.body_end) : 0;
  std::int64_t i = from + kQuad * static_cast<int>(threadIdx.x);
  const int edge = static_cast<int>(threadIdx.x);
  bool at_edge = edge < before + after;
#pragma unroll 1
  while (i < to || at_edge) {
    const bool inner = i < to;
    const std::int64_t at = inner           ? i
                            : edge < before ? span.begin + edge
                                            : span.body_end + (edge - before);
    call(at, inner ? kQuad : 1, inner && entry.form != Form::SINGLES);
    at_edge = at_edge && inner;
    i += kQuad * static_cast<int>(blockDim.x);
  }
}

// A block's statistics of one entry until the next begins.
struct BlockSums {
  WindowedSum sums[kWarps][kSumsOfLaunch];
  double nonfinite[kWarps][kSumsOfLaunch];
};

// Joins a warp's sums into the block's.
TVFAST_STAGE void put(BlockSums& all, int number, const ThreadSum& own) {
  const WindowedSum sum = join_warp(own);
  const bool any = __any_sync(0xffffffffu, own.nonfinite != 0.0);
  double nonfinite = own.nonfinite;
  if (any) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) nonfinite += __shfl_xor_sync(0xffffffffu, nonfinite, by);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 != 0) return;
  if (sum.window != kNoWindow) add(all.sums[warp][number], sum);
  if (any) all.nonfinite[warp][number] += nonfinite;
}

TVFAST_STAGE void put_count(unsigned long long* counts, int number, int own) {
  const unsigned sum = __reduce_add_sync(0xffffffffu, static_cast<unsigned>(own));
  if (threadIdx.x % 32 == 0 && sum != 0)
    atomicAdd(counts + number,
              static_cast<unsigned long long>(static_cast<long long>(static_cast<int>(sum))));
}

// Sums and counts of one model over a span.
TVFAST_STAGE void measure_model(const Measured& m, const TileSpan& span, std::int64_t from, int k,
                                unsigned wants, int first_sum, int n_sums, BlockSums& all,
                                unsigned long long* counts) {
  const SumNumbers numbers{m.n_models};
  const auto taken = [=](int number) { return number >= first_sum && number < first_sum + n_sums; };
  const bool before = (wants & L1_BEFORE) != 0 && taken(numbers.l1_before(k));
  const bool after = (wants & L1) != 0 && taken(numbers.l1(k));
  const bool square = (wants & SQUARES) != 0 && (wants & GRAM) == 0 && taken(numbers.product(k, k));
  const bool counted = (wants & COUNTS) != 0 && first_sum == 0;
  if (!before && !after && !square && !counted) return;
  ThreadSum l1_before, l1, squares;
  int n_kept = 0, n_nonzero = 0, n_nonfinite = 0;
  for_each(m.entry, span, from, [&](const Quad& quad) {
    TauQuad t;
    load_kept(m, k, quad, t);
    double x[kQuad];
    if (before) {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) x[e] = static_cast<double>(magnitude(t.tau[e]));
      add_quad(l1_before, x);
    }
    if (after) {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) x[e] = static_cast<double>(magnitude(t.kept[e]));
      add_quad(l1, x);
    }
    if (square) {
#pragma unroll
      for (int e = 0; e < kQuad; ++e)
        x[e] = static_cast<double>(t.kept[e]) * static_cast<double>(t.kept[e]);
      add_quad(squares, x);
    }
    if (counted) {
      F model[kQuad];
      load_quad(m.models[k].model, quad.i, quad.n, quad.whole, model);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        n_kept += t.is_kept[e];
        n_nonzero += t.is_kept[e] && not_zero(t.kept[e]);
        n_nonfinite += e < quad.n && !is_finite(model[e]);
      }
    }
  });
  if (before) put(all, numbers.l1_before(k) - first_sum, l1_before);
  if (after) put(all, numbers.l1(k) - first_sum, l1);
  if (square) put(all, numbers.product(k, k) - first_sum, squares);
  if (counted) {
    const CountNumbers places{m.n_models};
    put_count(counts, places.kept(k), n_kept);
    put_count(counts, places.nonzero(k), n_nonzero);
    put_count(counts, places.nonfinite(k), n_nonfinite);
  }
}

// The product of models j and k over a span.
TVFAST_STAGE void measure_product(const Measured& m, const TileSpan& span, std::int64_t from, int j,
                                  int k, int first_sum, int n_sums, BlockSums& all) {
  const int number = SumNumbers{m.n_models}.product(j, k) - first_sum;
  if (number < 0 || number >= n_sums) return;
  ThreadSum sum;
  for_each(m.entry, span, from, [&](const Quad& quad) {
    F first[kQuad] = {};
    double x[kQuad];
    // One keep stage in the code for both: it is long, and so is its need of registers.
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      TauQuad t;
      load_kept(m, side == 0 ? j : k, quad, t);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        x[e] = static_cast<double>(first[e]) * static_cast<double>(t.kept[e]);
        first[e] = t.kept[e];
      }
    }
    add_quad(sum, x);
  });
  put(all, number, sum);
}

// The product of model k with its scores over a span.
TVFAST_STAGE void measure_dot(const Measured& m, const TileSpan& span, std::int64_t from, int k,
                              int first_sum, int n_sums, BlockSums& all) {
  const int number = SumNumbers{m.n_models}.dot(k) - first_sum;
  if (number < 0 || number >= n_sums || m.models[k].score.data == nullptr) return;
  ThreadSum sum;
  for_each(m.entry, span, from, [&](const Quad& quad) {
    TauQuad t;
    load_kept(m, k, quad, t);
    F score[kQuad];
    load_quad(m.models[k].score, quad.i, quad.n, quad.whole, score);
    double x[kQuad];
#pragma unroll
    for (int e = 0; e < kQuad; ++e)
      x[e] = e < quad.n ? static_cast<double>(t.kept[e]) * static_cast<double>(score[e]) : 0.0;
    add_quad(sum, x);
  });
  put(all, number, sum);
}

// Entries of model k over a span that no other model has beside it.
TVFAST_STAGE void measure_alone(const Measured& m, const TileSpan& span, std::int64_t from, int k,
                                unsigned long long* counts) {
  int n_alone = 0;
  for_each(m.entry, span, from, [&](const Quad& quad) {
    int n_present[kQuad] = {};
    M own[kQuad] = {};
    for (int other = 0; other < m.n_models; ++other) {
      TauQuad t;
      load_kept(m, other, quad, t);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        n_present[e] += not_zero(t.kept[e]);
        own[e] = own[e] || (other == k && not_zero(t.kept[e]));
      }
    }
#pragma unroll
    for (int e = 0; e < kQuad; ++e) n_alone += own[e] && n_present[e] == 1;
  });
  put_count(counts, CountNumbers{m.n_models}.alone(k), n_alone);
}

// Conflicts, elected signs and non-finite entries of the base over a span.
TVFAST_STAGE void measure_entry(const Measured& m, const TileSpan& span, std::int64_t from,
                                unsigned wants, unsigned long long* counts) {
  const CountNumbers places{m.n_models};
  if ((wants & COUNTS) != 0 && m.entry.base.data != nullptr) {
    int n_nonfinite = 0;
    for_each(m.entry, span, from, [&](const Quad& quad) {
      F base[kQuad];
      load_quad(m.entry.base, quad.i, quad.n, quad.whole, base);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) n_nonfinite += e < quad.n && !is_finite(base[e]);
    });
    put_count(counts, places.base_nonfinite(), n_nonfinite);
  }
  if ((wants & VOTES) == 0) return;
  int n_conflicts = 0, n_elected = 0;
  for_each(m.entry, span, from, [&](const Quad& quad) {
    F votes[kQuad] = {}, relations[kQuad] = {};
    M positive[kQuad] = {}, negative[kQuad] = {};
    const bool voted = m.program.vote != Vote::NONE;
    // One keep stage in the code for both passes; the first is for weights that depend on all.
#pragma unroll 1
    for (int pass = voted && uses_relation(m.program.weighting) ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
      for (int k = 0; k < m.n_models; ++k) {
        TauQuad t;
        load_kept(m, k, quad, t);
        const ModelScalars& s = m.scalars[k];
        F weight[kQuad] = {};
        if (voted && pass == 1) load_weights(m.program, relations, k, s, m.models[k], quad, weight);
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
          positive[e] = positive[e] || t.kept[e] > 0.0f;
          negative[e] = negative[e] || t.kept[e] < 0.0f;
          if (!voted) continue;
          const F own = rescale(m.program, s, t.ranks[e], t.kept[e]);
          if (pass == 0) {
            relations[e] = add_relation(m.program, relations[e], k, own, s.weight, m.divisor_floor);
          } else {
            votes[e] = add_vote(m.program, votes[e], own, weight[e]);
          }
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      n_conflicts += positive[e] && negative[e];
      if (e < quad.n) n_elected += (votes[e] > 0.0f) - (votes[e] < 0.0f);
    }
  });
  put_count(counts, places.conflicts(), n_conflicts);
  if (m.program.vote != Vote::NONE) put_count(counts, places.elected(), n_elected);
}

TVFAST_STAGE void clear(BlockSums& all) {
  for (int at = static_cast<int>(threadIdx.x); at < kWarps * kSumsOfLaunch;
       at += static_cast<int>(blockDim.x)) {
    all.sums[at / kSumsOfLaunch][at % kSumsOfLaunch] = {kNoWindow, 0, 0};
    all.nonfinite[at / kSumsOfLaunch][at % kSumsOfLaunch] = 0.0;
  }
}

// Adds a block's sums of one entry to the entry's.
TVFAST_STAGE void flush(BlockSums& all, const Gathered& gathered, std::int64_t first_slot,
                        int n_sums) {
  for (int number = static_cast<int>(threadIdx.x); number < n_sums;
       number += static_cast<int>(blockDim.x)) {
    WindowedSum sum{kNoWindow, 0, 0};
    double nonfinite = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) {
      if (all.sums[warp][number].window != kNoWindow) add(sum, all.sums[warp][number]);
      nonfinite += all.nonfinite[warp][number];
    }
    const std::int64_t slot = first_slot + number;
    add_to_slots(gathered.limbs + slot * kWindows * kLimbs, gathered.used + slot, sum);
    if (nonfinite != 0.0) atomicAdd(gathered.nonfinite + slot, nonfinite);
  }
}

// What one launch gathers: a kernel with all of it would need more registers than there are.
enum class Part { MODELS, PRODUCTS, DOTS, ALONE, ENTRY };

// Sums [first_sum, first_sum + n_sums) of every entry; counts with the first of them.
template <Part part>
__global__ void __launch_bounds__(kThreads, kMeasureBlocksPerMultiprocessor)
    measure_kernel(DeviceTable table, DeviceScalars scalars, Program program, unsigned wants,
                   int first_sum, int n_sums, Gathered gathered) {
  alignas(16) __shared__ unsigned char storage[sizeof(BlockSums)];
  BlockSums& all = *reinterpret_cast<BlockSums*>(storage);
  const SumNumbers numbers{table.n_models};
  const CountNumbers places{table.n_models};
  std::int32_t open = -1;
  for (std::int64_t tile = blockIdx.x; tile < table.n_tiles; tile += gridDim.x) {
    const TileSpan span = span_of(table, tile);
    if (span.entry != open) {
      __syncthreads();
      if (open >= 0) flush(all, gathered, std::int64_t{open} * numbers.size() + first_sum, n_sums);
      __syncthreads();
      clear(all);
      __syncthreads();
      open = span.entry;
    }
    const std::int64_t first_model = std::int64_t{span.entry} * table.n_models;
    const Measured m{program,
                     table.entries[span.entry],
                     table.models + first_model,
                     scalars.models + first_model,
                     table.n_models,
                     scalars.tensors[span.entry].divisor_floor};
    unsigned long long* counts = gathered.counts + std::int64_t{span.entry} * places.size();
    std::int64_t from = span.body;
    do {
      if constexpr (part == Part::MODELS) {
        for (int k = 0; k < table.n_models; ++k)
          measure_model(m, span, from, k, wants, first_sum, n_sums, all, counts);
      }
      if constexpr (part == Part::PRODUCTS) {
        for (int j = 0; j < table.n_models; ++j)
          for (int k = j; k < table.n_models; ++k)
            measure_product(m, span, from, j, k, first_sum, n_sums, all);
      }
      if constexpr (part == Part::DOTS) {
        for (int k = 0; k < table.n_models; ++k)
          measure_dot(m, span, from, k, first_sum, n_sums, all);
      }
      if constexpr (part == Part::ALONE) {
        for (int k = 0; k < table.n_models; ++k) measure_alone(m, span, from, k, counts);
      }
      if constexpr (part == Part::ENTRY) measure_entry(m, span, from, wants, counts);
      from += kMeasureSpan;
    } while (from < span.body_end);
  }
  __syncthreads();
  if (open >= 0) flush(all, gathered, std::int64_t{open} * numbers.size() + first_sum, n_sums);
}

// A thread's four bits join those of fifteen neighbours in one word of the plane.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor / 2)
    row_masks_kernel(DeviceTable table, DeviceScalars scalars, Program program) {
  for (std::int64_t tile = blockIdx.x; tile < table.n_tiles; tile += gridDim.x) {
    const TileSpan span = whole_words_of(table, tile);
    const DeviceEntry& entry = table.entries[span.entry];
    const std::int64_t first_model = std::int64_t{span.entry} * table.n_models;
    const Measured m{
        program,        entry, table.models + first_model, scalars.models + first_model,
        table.n_models, 0.0f};
    const std::int64_t n_words = (span.end - span.begin + 63) / 64;
    const int group = static_cast<int>(threadIdx.x) / 16,
              n_groups = static_cast<int>(blockDim.x) / 16;
    const int place = static_cast<int>(threadIdx.x) % 16;
    // Every thread of a warp takes part in each exchange, those past the end with no bits.
    for (std::int64_t first = 0; first < n_words; first += n_groups) {
      const std::int64_t i = span.begin + 64 * (first + group) + kQuad * place;
      const std::int64_t left = span.end - i;
      const int n = left < 0 ? 0 : left < kQuad ? static_cast<int>(left) : kQuad;
      const Quad quad{i, static_cast<std::uint64_t>(entry.offset + i), n,
                      n == kQuad && entry.head == 0 && entry.form != Form::SINGLES};
      for (int k = 0; k < table.n_models; ++k) {
        unsigned long long word = 0;
        if (n > 0) {
          TauQuad t;
          load_kept(m, k, quad, t);
#pragma unroll
          for (int e = 0; e < kQuad; ++e)
            word |= static_cast<unsigned long long>(t.is_kept[e]) << (kQuad * place + e);
        }
#pragma unroll
        for (int by = 8; by > 0; by /= 2) word |= __shfl_xor_sync(0xffffffffu, word, by);
        if (place == 0 && n > 0) const_cast<std::uint64_t*>(m.models[k].mask)[i >> 6] = word;
      }
    }
  }
}

}  // namespace

void measure(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
             unsigned wants, void* workspace, Place place) {
  const OnDevice current(place.device);
  const GatheredLayout parts(table.n_entries, table.n_models);
  const auto at = parts.at(static_cast<unsigned char*>(workspace));
  const Gathered gathered{
      reinterpret_cast<unsigned long long*>(at.limbs), reinterpret_cast<double*>(at.nonfinite),
      reinterpret_cast<unsigned*>(at.used), reinterpret_cast<unsigned long long*>(at.counts)};
  fill_zero(workspace, parts.size(), place);
  const auto run = [&](auto kernel, int first, int n) {
    launch_tiles(kernel, table, place, scalars, program, wants, first, n, gathered);
  };
  const int n_sums = SumNumbers{table.n_models}.size();
  for (int first = 0; first < n_sums; first += kSumsOfLaunch) {
    const int n = std::min(n_sums - first, kSumsOfLaunch);
    const bool counts = (wants & COUNTS) != 0 && first == 0;
    if ((wants & (L1_BEFORE | L1 | SQUARES)) != 0 || counts)
      run(measure_kernel<Part::MODELS>, first, n);
    if ((wants & GRAM) != 0) run(measure_kernel<Part::PRODUCTS>, first, n);
    if ((wants & DOTS) != 0 && first + n > SumNumbers{table.n_models}.dot(0))
      run(measure_kernel<Part::DOTS>, first, n);
  }
  if ((wants & ALONE) != 0) run(measure_kernel<Part::ALONE>, 0, 0);
  if ((wants & (COUNTS | VOTES)) != 0) run(measure_kernel<Part::ENTRY>, 0, 0);
}

void row_masks(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
               Place place) {
  const OnDevice current(place.device);
  launch_tiles(row_masks_kernel, table, place, scalars, program);
}

}  // namespace tvfast::gpu
