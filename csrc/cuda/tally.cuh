// Counts of a merge with guessed lower ends: of up to four models, how many keys are above the end
// and from it on.
#pragma once

#include "api.hpp"
#include "lanes.cuh"

namespace tvfast::gpu {

inline constexpr int kTallied = 4;

// A thread's counts of a tile, a byte for each model.
struct Tally {
  U from = 0, above = 0;

  // NaN is above everything.
  TVFAST_STAGE_MEMBER void count(int k, F tau, F lo) {
    const F a = magnitude(tau);
    if (!(a < lo)) from += 1u << 8 * k;
    if (!(a <= lo)) above += 1u << 8 * k;
  }
};
static_assert(kTile / kThreads + 2 * kQuad < 256);

// A block's: from and above of even models, then of odd ones, two 16-bit counters each.
struct TileCounts {
  U from[2], above[2];
};
static_assert(kTile + 4 * kQuad < 65536);

TVFAST_STAGE void clear(TileCounts& counts) {
  if (threadIdx.x < 2) counts.from[threadIdx.x] = counts.above[threadIdx.x] = 0;
}

// Adds a tile's counts to those of the guesses; every thread of the block takes part.
TVFAST_STAGE void add_tally(const Trial& trial, std::int64_t first_model, int n_models,
                            const Tally& own, TileCounts& counts) {
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const U from = __reduce_add_sync(0xffffffffu, own.from >> 8 * odd & 0x00ff00ffu);
    const U above = __reduce_add_sync(0xffffffffu, own.above >> 8 * odd & 0x00ff00ffu);
    if (threadIdx.x % 32 == 0) {
      atomicAdd(&counts.from[odd], from);
      atomicAdd(&counts.above[odd], above);
    }
  }
  __syncthreads();
  const int k = static_cast<int>(threadIdx.x);
  if (k >= n_models) return;
  const std::int32_t query = trial.row_queries[first_model + k];
  if (query < 0) return;
  const int shift = 16 * (k / 2);
  atomicAdd(&trial.guesses[query].n_from, Count{counts.from[k % 2] >> shift & 0xffffu});
  atomicAdd(&trial.guesses[query].n_greater, Count{counts.above[k % 2] >> shift & 0xffffu});
}

}  // namespace tvfast::gpu
