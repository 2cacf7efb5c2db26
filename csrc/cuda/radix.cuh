// Radix selection inside a block: the k-th largest key of an array, digit by digit from the top of
// the range that holds it.
#pragma once

#include "block.cuh"
#include "select_plan.hpp"

namespace tvfast::gpu {

// How far the keys of [lo, hi] are shifted so that what is above lo fits a digit.
static __device__ __forceinline__ int digit_shift(std::uint32_t lo, std::uint32_t hi) {
  const int n_bits = 32 - __clz(static_cast<int>(hi - lo));
  return n_bits > kDigitBits ? n_bits - kDigitBits : 0;
}

struct Digit {
  std::uint32_t value;
  Count n_above, n_equal;
};

// The digit that holds the k-th largest of the counted, for all threads; 1 <= k <= their number.
template <int n_threads, class T>
static __device__ __forceinline__ Digit choose_digit(const T* bins, Count k) {
  static_assert(kDigits % n_threads == 0);
  constexpr int n_own = kDigits / n_threads;
  __shared__ std::uint32_t value;
  __shared__ Count n_above, n_equal;
  // Thread 0 takes the largest digits.
  const int last = kDigits - 1 - n_own * static_cast<int>(threadIdx.x);
  Count own = 0, all;
#pragma unroll
  for (int i = 0; i < n_own; ++i) own += bins[last - i];
  Count before = block_scan<n_threads>(own, all);
  if (before < k && k <= before + own) {
#pragma unroll
    for (int i = 0; i < n_own; ++i) {
      const Count n = bins[last - i];
      if (before < k && k <= before + n) {
        value = static_cast<std::uint32_t>(last - i);
        n_above = before;
        n_equal = n;
      }
      before += n;
    }
  }
  __syncthreads();
  const Digit digit{value, n_above, n_equal};
  __syncthreads();
  return digit;
}

struct Selected {
  std::uint32_t key;
  Count n_greater, n_equal;
};

// Keys that a thread asks for before it counts the first of them. A block has a multiprocessor to
// itself and its keys are in the second-level cache or behind it: one at a time, 512 threads would
// have 2 KiB on their way. Not yet measured on a device.
inline constexpr int kAhead = 8;

// Of ranks k[0] ... the largest keys of n, of which those outside [lo, hi] do not count, for all
// threads; a rank of 0 asks for nothing. Each pass reads the keys once for all ranks.
template <int n_threads, int n_ranks>
static __device__ __forceinline__ void select_keys(const std::uint32_t* keys, std::int64_t n,
                                                   std::uint32_t lo, std::uint32_t hi,
                                                   const Count (&k)[n_ranks],
                                                   Selected (&found)[n_ranks]) {
  __shared__ std::uint32_t bins[n_ranks][kDigits];
  std::uint32_t los[n_ranks], his[n_ranks];
  bool open[n_ranks];
#pragma unroll
  for (int r = 0; r < n_ranks; ++r) {
    los[r] = lo;
    his[r] = hi;
    open[r] = k[r] != 0;
    found[r] = {lo, 0, 0};
  }
  for (;;) {
    // Ranks whose ranges are still the same share the counters of the first of them.
    bool any = false;
    int counters[n_ranks];
#pragma unroll
    for (int r = 0; r < n_ranks; ++r) {
      any = any || open[r];
      counters[r] = r;
#pragma unroll
      for (int other = r - 1; other >= 0; --other)
        if (open[other] && los[other] == los[r] && his[other] == his[r]) counters[r] = other;
    }
    if (!any) return;
    for (int i = static_cast<int>(threadIdx.x); i < n_ranks * kDigits; i += n_threads)
      bins[i / kDigits][i % kDigits] = 0;
    __syncthreads();
    for (std::int64_t first = threadIdx.x; first < n; first += n_threads * kAhead) {
      std::uint32_t ahead[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const std::int64_t i = first + a * n_threads;
        ahead[a] = i < n ? __ldg(keys + i) : 0xffffffffu;  // above every key
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
#pragma unroll
        for (int r = 0; r < n_ranks; ++r)
          if (open[r] && counters[r] == r && ahead[a] >= los[r] && ahead[a] <= his[r])
            atomicAdd(&bins[r][(ahead[a] - los[r]) >> digit_shift(los[r], his[r])], 1u);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < n_ranks; ++r) {
      if (!open[r]) continue;
      const int shift = digit_shift(los[r], his[r]);
      const Digit digit = choose_digit<n_threads>(bins[counters[r]], k[r] - found[r].n_greater);
      found[r].n_greater += digit.n_above;
      found[r].n_equal = digit.n_equal;
      found[r].key = los[r] = los[r] + (digit.value << shift);
      const std::uint32_t last = los[r] + ((1u << shift) - 1u);
      his[r] = last < his[r] ? last : his[r];
      open[r] = shift != 0;
    }
  }
}

}  // namespace tvfast::gpu
