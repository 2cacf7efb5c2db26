// Storage types and their exact conversions to and from float, one element at a time.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace tvfast {

enum class DType : std::uint8_t { F32 = 0, BF16 = 1, F16 = 2 };

constexpr std::size_t size_of(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

constexpr const char* name_of(DType dtype) {
  return dtype == DType::F32 ? "float32" : dtype == DType::BF16 ? "bfloat16" : "float16";
}

}  // namespace tvfast
