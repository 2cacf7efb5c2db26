// One pass over the tiles of a table that counts keys against the brackets of queries and collects
// those inside.
#pragma once

#include "select.cuh"

namespace tvfast::gpu {

// Queries that take a tile together: the base is read once for all of them.
inline constexpr int kChunk = 4;

// Keys that a block holds of each query before it appends them to the collected ones.
inline constexpr int kHeld = 1024;

// Queries of one group that take a tile together, in shared memory.
struct Chunk {
  F lo[kChunk], hi[kChunk];
  std::int32_t model[kChunk];  // -1: none, or answered
  DeviceView view[kChunk];     // what the keys are made of, for all but variances
  DeviceScoreMap map[kChunk];  // where they are scores
  QueryState* state[kChunk];
  std::uint32_t* keys[kChunk];
  Count room[kChunk];                                  // 0 once it is full
  U above_hi_from_lo[kChunk], from_hi_inside[kChunk];  // two 16-bit counters each
  U n_held[kChunk];
  Count held_at[kChunk];
  std::uint32_t held[kChunk][kHeld];
};

// A thread's counts of a tile, in bytes.
inline constexpr U kAboveHi = 1u, kFromHi = 1u << 8, kFromLo = 1u << 16, kInside = 1u << 24;
static_assert(kTile / kThreads + 2 * kQuad < 256);
static_assert(kTile + 4 * kQuad < 65536);

// Counts a magnitude; NaN is above everything. Whether it is strictly inside the bracket.
TVFAST_STAGE void count(F a, F lo, F hi, U& counts) {
  const M from_hi = !(a < hi);
  if (!(a <= hi)) counts += kAboveHi;
  if (from_hi) counts += kFromHi;
  if (!(a < lo)) counts += kFromLo;
  if (!(a <= lo) && !from_hi) counts += kInside;
}

TVFAST_STAGE void hold(Chunk& chunk, int c, std::uint32_t key) {
  if (chunk.room[c] == 0) return;
  const U at = atomicAdd(&chunk.n_held[c], 1u);
  if (at < kHeld) chunk.held[c][at] = key;
}

TVFAST_STAGE void count_quad(Chunk& chunk, int c, const F* x, int n, U& counts) {
  const U before = counts;
  const F lo = chunk.lo[c], hi = chunk.hi[c];
#pragma unroll
  for (int e = 0; e < kQuad; ++e)
    if (e < n) count(magnitude(x[e]), lo, hi, counts);
  if ((counts ^ before) < kInside) return;
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    const F a = magnitude(x[e]);
    if (e < n && a > lo && a < hi) hold(chunk, c, bits(a));
  }
}

// Up to kChunk queries from `first` on; whether one of them is open.
template <Keep keep>
TVFAST_STAGE bool open_chunk(const DeviceSelection& s, QueryRange range, const DeviceModel* models,
                             Chunk& chunk) {
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x);
  if (c < kChunk) {
    chunk.model[c] = -1;
    chunk.n_held[c] = chunk.above_hi_from_lo[c] = chunk.from_hi_inside[c] = 0;
    if (range.first + c < range.last) {
      const DeviceQuery& query = s.queries[range.first + c];
      QueryState& state = s.states[query.place];
      if (state.open != 0) chunk.model[c] = query.model;
      chunk.view[c] = keep == Keep::SCORE ? models[query.model].score : models[query.model].model;
      chunk.map[c] = models[query.model].map;
      chunk.lo[c] = from_bits(state.lo);
      chunk.hi[c] = from_bits(state.hi);
      chunk.state[c] = &state;
      chunk.keys[c] = s.keys + query.keys_at;
      const Count room = static_cast<Count>(query.n_keys);
      chunk.room[c] = state.n_collected < room ? room : 0;
    }
  }
  __syncthreads();
  bool any = false;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) any = any || chunk.model[i] >= 0;
  return any;
}

// Collects a tile's keys inside a bracket by looking at them again: a block cannot hold so many.
template <Keep keep>
TVFAST_STAGE void collect_again(const DeviceTable& table, const TileSpan& span, const Chunk& chunk,
                                int c) {
  const DeviceEntry& entry = table.entries[span.entry];
  const DeviceModel* models = table.models + std::int64_t{span.entry} * table.n_models;
  // One at a time: four would take registers from the counting of every tile.
  const auto for_each_inside = [&](auto&& fn) {
#pragma unroll 1
    for (std::int64_t i = span.begin + threadIdx.x; i < span.end; i += kThreads) {
      F x[kQuad];
      load_ranked<keep>(entry, models, table.n_models, chunk.model[c], i, 1, false, x);
      const F a = magnitude(x[0]);
      if (a > chunk.lo[c] && a < chunk.hi[c]) fn(bits(a));
    }
  };
  U n_own = 0, n_all;
  for_each_inside([&](std::uint32_t) { ++n_own; });
  Count place = chunk.held_at[c] + block_scan(n_own, n_all);
  for_each_inside([&](std::uint32_t key) {
    if (place < chunk.room[c]) chunk.keys[c][place] = key;
    ++place;
  });
}

// Adds a tile's counts and held keys to what was found of each query.
template <Keep keep>
TVFAST_STAGE void close_chunk(const DeviceTable& table, std::int64_t tile, Chunk& chunk,
                              const U (&counts)[kChunk]) {
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    const U even = warp_sum(counts[c] & 0x00ff00ffu), odd = warp_sum(counts[c] >> 8 & 0x00ff00ffu);
    if (threadIdx.x % 32 == 0 && chunk.model[c] >= 0) {
      atomicAdd(&chunk.above_hi_from_lo[c], even);
      atomicAdd(&chunk.from_hi_inside[c], odd);
    }
  }
  __syncthreads();
  const int own = static_cast<int>(threadIdx.x);
  if (own < kChunk && chunk.model[own] >= 0) {
    QueryState& state = *chunk.state[own];
    const auto add = [](Count& to, U n) {
      if (n != 0) atomicAdd(&to, Count{n});
    };
    add(state.above_hi, chunk.above_hi_from_lo[own] & 0xffffu);
    add(state.from_lo, chunk.above_hi_from_lo[own] >> 16);
    add(state.from_hi, chunk.from_hi_inside[own] & 0xffffu);
    add(state.inside, chunk.from_hi_inside[own] >> 16);
    if (chunk.n_held[own] > 0)
      chunk.held_at[own] = atomicAdd(&state.n_collected, Count{chunk.n_held[own]});
  }
  __syncthreads();
  for (int c = 0; c < kChunk; ++c) {
    if (chunk.n_held[c] > kHeld) {
      collect_again<keep>(table, span_of(table, tile), chunk, c);
      continue;
    }
    for (U i = threadIdx.x; i < chunk.n_held[c]; i += kThreads)
      if (chunk.held_at[c] + i < chunk.room[c])
        chunk.keys[c][chunk.held_at[c] + i] = chunk.held[c][i];
  }
}

// Packets of one 16-bit type. Two models' are asked for before the first is used: with the base's
// that is 48 bytes on their way for each thread, and more would leave too few registers.
template <DType dtype>
TVFAST_STAGE void count_packets(const DeviceEntry& entry, const TileSpan& span, Chunk& chunk,
                                U (&counts)[kChunk]) {
  const bool subtracts = entry.subtracts;
  constexpr int kStep = 2 * kQuad, kTogether = 2;
  for (std::int64_t i = span.body + kStep * static_cast<int>(threadIdx.x); i < span.body_end;
       i += kStep * kThreads) {
    Packet base{};
    if (subtracts) base = load_packet(entry.base.data, i);
#pragma unroll
    for (int first = 0; first < kChunk; first += kTogether) {
      Packet packets[kTogether];
#pragma unroll
      for (int c = 0; c < kTogether; ++c)
        if (chunk.model[first + c] >= 0) packets[c] = load_packet(chunk.view[first + c].data, i);
#pragma unroll
      for (int c = 0; c < kTogether; ++c) {
        if (chunk.model[first + c] < 0) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          F x[kQuad], b[kQuad];
          unpack<dtype>(packets[c], half, x);
          if (subtracts) {
            unpack<dtype>(base, half, b);
#pragma unroll
            for (int e = 0; e < kQuad; ++e) x[e] = x[e] - b[e];
          }
          count_quad(chunk, first + c, x, kQuad, counts[first + c]);
        }
      }
    }
  }
}

// Quads of any types and alignment.
template <Keep keep>
TVFAST_STAGE void count_loaded(const DeviceEntry& entry, const DeviceModel* models, int n_models,
                               std::int64_t i, int n, bool whole, Chunk& chunk,
                               U (&counts)[kChunk]) {
  F base[kQuad] = {}, x[kQuad];
  const bool subtracts = entry.subtracts;
  if (keep == Keep::BAND && subtracts) load_quad(entry.base, i, n, whole, base);
  if (keep == Keep::VARIANCE) load_ranked<keep>(entry, models, n_models, 0, i, n, whole, x);
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    if (chunk.model[c] < 0) continue;
    if (keep == Keep::SCORE) load_scores(chunk.view[c], chunk.map[c], i, n, whole, x);
    if (keep == Keep::BAND) {
      load_quad(chunk.view[c], i, n, whole, x);
      if (subtracts) {
#pragma unroll
        for (int e = 0; e < kQuad; ++e) x[e] = x[e] - base[e];
      }
    }
    count_quad(chunk, c, x, n, counts[c]);
  }
}

template <Keep keep>
__global__ void __launch_bounds__(kThreads, ranking_blocks(keep))
    count_kernel(DeviceTable table, DeviceSelection s) {
  __shared__ Chunk chunk;
  if (*s.flags == 0) return;
  for (std::int64_t tile = s.batch.first_tile + blockIdx.x; tile < s.batch.end_tile;
       tile += gridDim.x) {
    const TileSpan span = span_of(table, tile);
    const DeviceEntry& entry = table.entries[span.entry];
    const DeviceModel* models = table.models + std::int64_t{span.entry} * table.n_models;
    for (QueryRange range = queries_of(s, entry.group); range.first < range.last;
         range.first += kChunk) {
      if (!open_chunk<keep>(s, range, models, chunk)) continue;
      U counts[kChunk] = {};
      const auto one_quad = [&](std::int64_t i, int n, bool whole) {
        count_loaded<keep>(entry, models, table.n_models, i, n, whole, chunk, counts);
      };
      for_each_edge(span, one_quad);
      if (keep == Keep::BAND && entry.form == Form::PACKED_BF16) {
        count_packets<DType::BF16>(entry, span, chunk, counts);
      } else if (keep == Keep::BAND && entry.form == Form::PACKED_F16) {
        count_packets<DType::F16>(entry, span, chunk, counts);
      } else {
        for_each_quad(entry, span, one_quad);
      }
      close_chunk<keep>(table, tile, chunk, counts);
    }
  }
}

}  // namespace tvfast::gpu
