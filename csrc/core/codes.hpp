// How 8-bit codes and their factors are stored.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tvfast {

// 8-bit codes that stand for a number times the factor of their block. OCP 8-bit floating point:
// E4M3 has no infinity and ends at 448, E5M2 is the upper half of float16 and ends at 57344.
enum class Fp8 : std::uint8_t { E4M3 = 0, E5M2 = 1 };

// How factors are stored; E8M0 is a power of two, its biased exponent.
enum class ScaleType : std::uint8_t { F32 = 0, BF16 = 1, F16 = 2, E8M0 = 3 };

constexpr std::size_t size_of(ScaleType type) {
  return type == ScaleType::F32 ? 4 : type == ScaleType::E8M0 ? 1 : 2;
}

}  // namespace tvfast
