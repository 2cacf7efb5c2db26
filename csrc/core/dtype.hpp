// Storage types.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tvfast {

enum class DType : std::uint8_t { F32 = 0, BF16 = 1, F16 = 2 };

constexpr std::size_t size_of(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

}  // namespace tvfast
