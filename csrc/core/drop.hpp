// Entries of one tensor that are dropped at random, with a probability for each bin of magnitudes.
#pragma once

#include <cstdint>

#include "program.hpp"

namespace tvfast {

// A bin is the leading bits of a magnitude in fp32: the exponent and nine more, 512 bins an octave.
inline constexpr int kMagnitudeBinBits = 17, kMagnitudeBinShift = 31 - kMagnitudeBinBits;
inline constexpr std::uint32_t kMagnitudeBins = 1u << kMagnitudeBinBits;

struct BinnedDrop {
  View values;
  // [kMagnitudeBins] An entry survives if the upper 31 bits of its draw are below this, at most
  // 2^31.
  const std::uint32_t* limits = nullptr;
  std::uint64_t key = 0;  // of the draws
  float* out = nullptr;   // the value, or +0
};

}  // namespace tvfast
