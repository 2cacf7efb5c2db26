// The runtime's services where device memory is the host's.
#include <atomic>
#include <cstring>

#include "../place.hpp"

namespace tvfast::gpu {

namespace {

std::atomic<std::int64_t> n_to_device, n_to_host, n_waits;

}  // namespace

DeviceFacts facts(int) { return {"host build of the CUDA kernels", 2, 0, 16}; }

void copy_to_device(void* to, const void* from, std::size_t n_bytes, Place) {
  ++n_to_device;
  if (n_bytes > 0) std::memcpy(to, from, n_bytes);
}
void copy_to_host(void* to, const void* from, std::size_t n_bytes, Place) {
  ++n_to_host;
  if (n_bytes > 0) std::memcpy(to, from, n_bytes);
}
void fill_zero(void* at, std::size_t n_bytes, Place) {
  if (n_bytes > 0) std::memset(at, 0, n_bytes);
}
void synchronize(Place) { ++n_waits; }

RuntimeCalls runtime_calls() { return {n_to_device, n_to_host, n_waits}; }

OnDevice::OnDevice(int) : before_(-1) {}
OnDevice::~OnDevice() = default;

const char* architectures() { return ""; }
void require(int) {}

}  // namespace tvfast::gpu
