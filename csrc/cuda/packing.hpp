// Arrays in one piece of memory, each aligned.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

namespace tvfast::gpu {

constexpr std::size_t aligned(std::size_t n_bytes) { return (n_bytes + 15) / 16 * 16; }

// Appends an array at an aligned place and returns the place.
template <class T>
std::size_t append(std::vector<std::byte>& bytes, const std::vector<T>& values) {
  const std::size_t at = aligned(bytes.size());
  bytes.resize(at + values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes.data() + at, values.data(), values.size() * sizeof(T));
  return at;
}

template <class T>
const T* at_bytes(const void* address, std::size_t at) {
  return reinterpret_cast<const T*>(static_cast<const std::byte*>(address) + at);
}
template <class T>
T* at_bytes(void* address, std::size_t at) {
  return reinterpret_cast<T*>(static_cast<std::byte*>(address) + at);
}

}  // namespace tvfast::gpu
