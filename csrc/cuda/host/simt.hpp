// CUDA's kernel language on the CPU: every thread of a block is a fiber, blocks run one after the
// other. The order of blocks and threads is a permutation that TVFAST_SIMT_SEED chooses, so that
// what depends on it shows. A test double: its results count, not its speed.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../place.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local

namespace tvfast::gpu {

namespace simt {

struct Index {
  unsigned x = 0;
};

// Of the thread that runs now.
extern thread_local Index thread_index, block_index, block_size, grid_size;

// Waits for the block's other threads.
void sync_block();

// Waits for the lanes of `mask`, gives every one the words of all, 32 of them.
void exchange(unsigned mask, std::uint64_t word, std::uint64_t* words);

void run(std::int64_t n_blocks, int n_threads, const std::function<void()>& thread);

inline unsigned lane() { return thread_index.x % 32; }

template <class T>
std::uint64_t to_word(T value) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(std::uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace simt

#define threadIdx (::tvfast::gpu::simt::thread_index)
#define blockIdx (::tvfast::gpu::simt::block_index)
#define blockDim (::tvfast::gpu::simt::block_size)
#define gridDim (::tvfast::gpu::simt::grid_size)

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t n_blocks, int n_threads, Place,
            Arguments... arguments) {
  simt::run(n_blocks, n_threads, [&] { kernel(arguments...); });
}

template <class... Parameters>
std::int64_t blocks_at_once(void (*)(Parameters...), int, Place place) {
  return facts(place.device).n_multiprocessors;
}

inline float half_to_float(std::uint16_t h) {
  return static_cast<float>(std::bit_cast<_Float16>(h));
}
inline std::uint16_t float_to_half(float x) {
  return std::bit_cast<std::uint16_t>(static_cast<_Float16>(x));
}

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  std::uint32_t x, y;
};

inline void __syncthreads() { simt::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  std::uint64_t words[32];
  simt::exchange(mask, 0, words);
}
inline void __threadfence() {}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  std::uint64_t words[32];
  simt::exchange(mask, predicate, words);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i & 1u) != 0 && words[i] != 0) ballot |= 1u << i;
  return ballot;
}
inline bool __any_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  std::uint64_t words[32];
  simt::exchange(mask, simt::to_word(value), words);
  return simt::from_word<T>(words[from & 31]);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  std::uint64_t words[32];
  simt::exchange(mask, value, words);
  unsigned sum = 0;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i & 1u) != 0) sum += static_cast<unsigned>(words[i]);
  return sum;
}
inline int __reduce_max_sync(unsigned mask, int value) {
  std::uint64_t words[32];
  simt::exchange(mask, simt::to_word(value), words);
  int most = value;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i & 1u) != 0) most = std::max(most, simt::from_word<int>(words[i]));
  return most;
}
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  std::uint64_t words[32];
  simt::exchange(mask, value, words);
  unsigned same = 0;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i & 1u) != 0 && static_cast<unsigned>(words[i]) == value) same |= 1u << i;
  return same;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return __shfl_sync(mask, value, static_cast<int>(simt::lane()) ^ with);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  const int from = static_cast<int>(simt::lane()) + by;
  return __shfl_sync(mask, value, from < 32 ? from : static_cast<int>(simt::lane()));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  const int from = static_cast<int>(simt::lane()) - by;
  return __shfl_sync(mask, value, from >= 0 ? from : static_cast<int>(simt::lane()));
}

// Blocks and threads run one at a time: an atomic is a plain update.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = static_cast<T>(before + value);
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}
template <class T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <class T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at = before | value;
  return before;
}
template <class T>
T atomicExch(T* at, T value) {
  const T before = *at;
  *at = value;
  return before;
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}

inline std::uint32_t __float_as_uint(float x) { return std::bit_cast<std::uint32_t>(x); }
inline float __uint_as_float(std::uint32_t x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline std::uint32_t __umulhi(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>(std::uint64_t{a} * b >> 32);
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
T __ldg(const T* at) {
  return *at;
}
// Loads and stores that are not read again soon.
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}

}  // namespace tvfast::gpu
