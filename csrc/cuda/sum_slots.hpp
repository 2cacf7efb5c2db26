// Where order-independent sums are gathered on the device, and what the host makes of them:
// docs/numerics.md, "Sums".
#pragma once

#include "../core/accumulate.hpp"

namespace tvfast::gpu {

inline constexpr int kLowestWindow = -8;  // of 2^-298, the smallest product of two float32
inline constexpr int kWindows = 16;
inline constexpr int kLimbs = 4;  // high and low integer, each as its 32 low bits and the rest

// Addends below 2^40 units each, of which float64 holds 2^53.
inline constexpr int kAddendsOfThread = 2048;

// The sum whose integers are in `limbs` [kWindows][kLimbs]; `used` has a bit for each window.
inline BinnedSum total(const unsigned long long* limbs, unsigned used, double nonfinite) {
  const auto wide = [](const unsigned long long* pair) {
    return static_cast<Int128>(static_cast<std::int64_t>(pair[1])) * (Int128{1} << 32) +
           static_cast<Int128>(pair[0]);
  };
  BinnedSum sum;
  sum.nonfinite = nonfinite;
  for (int slot = 0; slot < kWindows; ++slot) {
    if ((used >> slot & 1u) == 0) continue;
    BinnedSum one;
    one.window = slot + kLowestWindow;
    one.high = wide(limbs + slot * kLimbs);
    one.low = wide(limbs + slot * kLimbs + 2);
    sum.add(one);
  }
  return sum;
}

}  // namespace tvfast::gpu
