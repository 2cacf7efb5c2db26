// Sums and prefix sums over the threads of a block: CUB's on a device, plain ones in the host
// build. Every thread of the block calls them, and may call them again at once.
#pragma once

#include "policy.hpp"
#include "simt.hpp"

#if defined(__CUDACC__)
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
#endif

namespace tvfast::gpu {

// The sum of every thread's value, for every thread.
template <int n_threads = kThreads, class T>
static __device__ __forceinline__ T block_sum(T value) {
#if defined(__CUDACC__)
  using Reduce = cub::BlockReduce<T, n_threads>;
  __shared__ typename Reduce::TempStorage storage;
  __shared__ T sum;
  const T of_first = Reduce(storage).Sum(value);
  if (threadIdx.x == 0) sum = of_first;
  __syncthreads();
  const T result = sum;
#else
  __shared__ T values[n_threads];
  values[threadIdx.x] = value;
  __syncthreads();
  T result{};
  for (const T& one : values) result += one;
#endif
  __syncthreads();
  return result;
}

// The sum of the values of the threads before this one, and in `total` that of all.
template <int n_threads = kThreads, class T>
static __device__ __forceinline__ T block_scan(T value, T& total) {
#if defined(__CUDACC__)
  using Scan = cub::BlockScan<T, n_threads>;
  __shared__ typename Scan::TempStorage storage;
  T before;
  Scan(storage).ExclusiveSum(value, before, total);
#else
  __shared__ T values[n_threads];
  values[threadIdx.x] = value;
  __syncthreads();
  T before{};
  total = T{};
  for (unsigned i = 0; i < n_threads; ++i) {
    if (i == threadIdx.x) before = total;
    total += values[i];
  }
#endif
  __syncthreads();
  return before;
}

// The sum of every lane's value, in lane 0. All lanes of the warp call it.
template <class T>
static __device__ __forceinline__ T warp_sum(T value) {
#if defined(__CUDACC__)
  using Reduce = cub::WarpReduce<T>;
  typename Reduce::TempStorage storage;  // of no bytes for whole warps
  return Reduce(storage).Sum(value);
#else
  for (int by = 16; by > 0; by /= 2) value += __shfl_down_sync(0xffffffffu, value, by);
  return value;
#endif
}

}  // namespace tvfast::gpu
