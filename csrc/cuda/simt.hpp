// The language of the kernels, in two worlds: CUDA, and a host build that runs the same text on the
// CPU, thread by thread, for tests on machines without a GPU (host/simt.hpp).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "check.hpp"

namespace tvfast::gpu {

// Starts a kernel on a stream. An error of the launch itself is thrown at once.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t n_blocks, int n_threads, Place place,
            Arguments... arguments) {
  if (n_blocks == 0) return;
  kernel<<<static_cast<unsigned>(n_blocks), n_threads, 0,
           static_cast<cudaStream_t>(place.stream)>>>(arguments...);
  check(cudaGetLastError(), "launching a kernel");
}

// Blocks of a kernel that a device runs at once.
template <class... Parameters>
std::int64_t blocks_at_once(void (*kernel)(Parameters...), int n_threads, Place place) {
  int of_multiprocessor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_multiprocessor, kernel, n_threads, 0),
        "asking for a kernel's occupancy");
  if (of_multiprocessor == 0)
    throw DeviceError(
        "a kernel needs more registers or shared memory than this GPU has for a block");
  return std::int64_t{of_multiprocessor} * facts(place.device).n_multiprocessors;
}

__device__ __forceinline__ float half_to_float(std::uint16_t h) {
  return __half2float(__ushort_as_half(h));
}
__device__ __forceinline__ std::uint16_t float_to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

}  // namespace tvfast::gpu

#else

#include "host/simt.hpp"

#endif
