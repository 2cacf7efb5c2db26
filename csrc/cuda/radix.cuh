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

// The k-th largest of n keys, of which those outside [lo, hi] do not count, for all threads.
template <int n_threads>
static __device__ __forceinline__ Selected select_key(const std::uint32_t* keys, std::int64_t n,
                                                      std::uint32_t lo, std::uint32_t hi, Count k) {
  __shared__ std::uint32_t bins[kDigits];
  Count n_greater = 0;
  for (;;) {
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += n_threads) bins[i] = 0;
    __syncthreads();
    const int shift = digit_shift(lo, hi);
    for (std::int64_t i = threadIdx.x; i < n; i += n_threads) {
      const std::uint32_t key = keys[i];
      if (key >= lo && key <= hi) atomicAdd(&bins[(key - lo) >> shift], 1u);
    }
    __syncthreads();
    const Digit digit = choose_digit<n_threads>(bins, k - n_greater);
    n_greater += digit.n_above;
    lo += digit.value << shift;
    if (shift == 0) return {lo, n_greater, digit.n_equal};
    const std::uint32_t last = lo + ((1u << shift) - 1u);
    hi = last < hi ? last : hi;
  }
}

}  // namespace tvfast::gpu
