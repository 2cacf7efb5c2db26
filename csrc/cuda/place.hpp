// Where work runs, and what is known of the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tvfast::gpu {

struct Place {
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
};

// A call of the runtime, or a launch, that failed; the message says which and how.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceFacts {
  std::string name;
  int n_multiprocessors = 0;
  int capability = 0;  // 90 for sm_90
  int warps_per_multiprocessor = 0;
};

// The services of a device's runtime, which runtime.cu and host/runtime.cpp provide. All are queued
// on the stream; memory is the caller's.
DeviceFacts facts(int device);
void copy_to_device(void* to, const void* from, std::size_t n_bytes, Place place);
void copy_to_host(void* to, const void* from, std::size_t n_bytes, Place place);
void fill_zero(void* at, std::size_t n_bytes, Place place);
void synchronize(Place place);

// How often a module has asked its runtime for what a captured graph cannot hold.
struct RuntimeCalls {
  std::int64_t to_device, to_host, waits;
};
RuntimeCalls runtime_calls();

// Makes a device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// Architectures that this build holds code for, such as {80, 90}; empty in the host build.
const char* architectures();

// Throws DeviceError with the reason if this build cannot run on the device.
void require(int device);

}  // namespace tvfast::gpu
