// Constants of the hash that breaks ties: docs/numerics.md, "Tie hash".
#pragma once

#include <cstdint>

namespace tvfast {

// Factors of the low and the high word of an index.
inline constexpr std::uint32_t kMixIndex = 0x7FEB352Du, kMixHigh = 0x9E3779B9u * kMixIndex;

// What a model's key becomes: odd.
constexpr std::uint32_t hash_multiplier(std::uint64_t key) {
  return (static_cast<std::uint32_t>(key) ^ static_cast<std::uint32_t>(key >> 32) * 0x85EBCA6Bu) |
         1u;
}

}  // namespace tvfast
