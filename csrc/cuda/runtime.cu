// The runtime's services on a CUDA device.
#include <array>
#include <atomic>
#include <mutex>

#include "check.hpp"

#ifndef TVFAST_ARCHITECTURES
#error "TVFAST_ARCHITECTURES names what the module is compiled for, such as \"80, 90\""
#endif

namespace tvfast::gpu {

namespace {

__global__ void probe_kernel() {}

constexpr int kMostDevices = 64;

std::atomic<std::int64_t> n_to_device, n_to_host, n_waits;

}  // namespace

DeviceFacts facts(int device) {
  // Asking the driver takes longer than a small merge.
  static std::array<DeviceFacts, kMostDevices> known;
  static std::mutex lock;
  const std::lock_guard<std::mutex> guard(lock);
  if (device >= 0 && device < kMostDevices && known[device].n_multiprocessors > 0)
    return known[device];
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "asking for a device's properties");
  DeviceFacts found{properties.name, properties.multiProcessorCount,
                    10 * properties.major + properties.minor,
                    properties.maxThreadsPerMultiProcessor / properties.warpSize};
  if (device < kMostDevices) known[device] = found;
  return found;
}

void copy_to_device(void* to, const void* from, std::size_t n_bytes, Place place) {
  ++n_to_device;
  cudaStreamCaptureStatus capture;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(place.stream), &capture),
        "asking whether a stream is captured");
  if (capture != cudaStreamCaptureStatusNone)
    throw DeviceError(
        "a call that uploads its table is being captured in a CUDA graph, which would read host "
        "memory that is gone when it is replayed: make the merge with `prepared` or `trimmed` "
        "before the capture, and capture its `run`");
  check(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(place.stream)),
        "copying to the device");
}

void copy_to_host(void* to, const void* from, std::size_t n_bytes, Place place) {
  ++n_to_host;
  check(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToHost,
                        static_cast<cudaStream_t>(place.stream)),
        "copying from the device");
}

void fill_zero(void* at, std::size_t n_bytes, Place place) {
  check(cudaMemsetAsync(at, 0, n_bytes, static_cast<cudaStream_t>(place.stream)),
        "clearing device memory");
}

void synchronize(Place place) {
  ++n_waits;
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(place.stream)), "waiting for the device");
}

RuntimeCalls runtime_calls() { return {n_to_device, n_to_host, n_waits}; }

OnDevice::OnDevice(int device) {
  check(cudaGetDevice(&before_), "asking for the current device");
  if (device == before_) {
    before_ = -1;
    return;
  }
  check(cudaSetDevice(device), "choosing a device");
}

OnDevice::~OnDevice() {
  if (before_ >= 0) (void)cudaSetDevice(before_);
}

const char* architectures() { return TVFAST_ARCHITECTURES; }

void require(int device) {
  int driver = 0, n_devices = 0;
  check(cudaDriverGetVersion(&driver), "asking for the driver's version");
  if (driver == 0) throw DeviceError("no NVIDIA driver is loaded");
  if (driver < CUDART_VERSION / 1000 * 1000)
    throw DeviceError("the driver supports CUDA " + std::to_string(driver / 1000) + "." +
                      std::to_string(driver % 1000 / 10) + "; this build needs CUDA " +
                      std::to_string(CUDART_VERSION / 1000) + ": update the driver");
  check(cudaGetDeviceCount(&n_devices), "counting devices");
  if (device < 0 || device >= n_devices)
    throw DeviceError("device " + std::to_string(device) + " does not exist; there are " +
                      std::to_string(n_devices));
  const OnDevice current(device);
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction) {
    (void)cudaGetLastError();
    throw DeviceError("built for sm_" + std::string(TVFAST_ARCHITECTURES) + "; this GPU is sm_" +
                      std::to_string(facts(device).capability));
  }
  check(code, "loading the kernels");
}

}  // namespace tvfast::gpu
