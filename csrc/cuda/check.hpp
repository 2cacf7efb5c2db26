// CUDA's error codes as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "place.hpp"

namespace tvfast::gpu {

inline void check(cudaError_t code, const char* doing) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();  // said here; the next launch is not to be blamed for it
  throw DeviceError(std::string(doing) + " failed: " + cudaGetErrorName(code) + ": " +
                    cudaGetErrorString(code));
}

}  // namespace tvfast::gpu
