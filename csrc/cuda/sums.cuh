// Order-independent sums on the device: docs/numerics.md, "Sums". A thread sums a few addends in
// float64 at one window, a warp joins its threads', and integers go to the slot of the window.
#pragma once

#include "lanes.cuh"
#include "sum_slots.hpp"

namespace tvfast::gpu {

// 2^exponent, -1022 <= exponent <= 1023.
TVFAST_STAGE double power_of_two(int exponent) {
  return __longlong_as_double(static_cast<long long>(exponent + 1023) << 52);
}

// A sum at a window: multiples of 2^(40 window), and of 2^(40 (window - 1)) below them.
struct WindowedSum {
  int window;
  std::int64_t high, low;
};

TVFAST_STAGE void raise(WindowedSum& sum, int to) {
  if (to <= sum.window) return;
  sum.low = to == sum.window + 1 ? sum.high : 0;
  sum.high = 0;
  sum.window = to;
}

TVFAST_STAGE void add(WindowedSum& sum, WindowedSum other) {
  raise(sum, other.window);
  raise(other, sum.window);
  sum.high += other.high;
  sum.low += other.low;
}

// One thread's sum of at most kAddendsOfThread addends: exact, in float64.
struct ThreadSum {
  int window = kNoWindow;
  double high = 0.0, low = 0.0;
  double nonfinite = 0.0;
};

TVFAST_STAGE void add_quad(ThreadSum& sum, const double* x) {
  unsigned long long most = 0;
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    const unsigned long long magnitude =
        static_cast<unsigned long long>(__double_as_longlong(x[e])) & 0x7fffffffffffffffull;
    most = magnitude > most ? magnitude : most;
  }
  if (most == 0) return;
  double addends[kQuad];
#pragma unroll
  for (int e = 0; e < kQuad; ++e) addends[e] = x[e];
  if (most >= 0x7ff0000000000000ull) {
    most = 0;
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      const unsigned long long magnitude =
          static_cast<unsigned long long>(__double_as_longlong(x[e])) & 0x7fffffffffffffffull;
      const bool finite = magnitude < 0x7ff0000000000000ull;
      if (!finite) sum.nonfinite += x[e];
      addends[e] = finite ? x[e] : 0.0;
      if (finite && magnitude > most) most = magnitude;
    }
    if (most == 0) return;
  }
  // magnitude = f * 2^exponent with 0.5 <= f < 1; never subnormal in float64.
  const int exponent = static_cast<int>(most >> 52) - 1022;
  const int needed = (exponent - kLowestWindow * kWindowBits) / kWindowBits + kLowestWindow;
  if (needed > sum.window) {
    sum.low = needed == sum.window + 1 ? sum.high : 0.0;
    sum.high = 0.0;
    sum.window = needed;
  }
  // Adding and taking away 1.5 * 2^52 units rounds to the unit.
  const double split_high = 1.5 * power_of_two(52 + kWindowBits * sum.window);
  const double split_low = 1.5 * power_of_two(52 + kWindowBits * (sum.window - 1));
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    const double q = (addends[e] + split_high) - split_high;
    sum.high += q;
    sum.low += ((addends[e] - q) + split_low) - split_low;
  }
}

TVFAST_STAGE WindowedSum windowed(const ThreadSum& sum) {
  if (sum.window == kNoWindow) return {kNoWindow, 0, 0};
  return {sum.window, static_cast<std::int64_t>(sum.high * power_of_two(-kWindowBits * sum.window)),
          static_cast<std::int64_t>(sum.low * power_of_two(-kWindowBits * (sum.window - 1)))};
}

// The sum of a warp's threads, in every lane.
TVFAST_STAGE WindowedSum join_warp(const ThreadSum& own) {
  WindowedSum sum = windowed(own);
  const int window = __reduce_max_sync(0xffffffffu, sum.window);
  if (window == kNoWindow) return {kNoWindow, 0, 0};
  raise(sum, window);
#pragma unroll
  for (int by = 16; by > 0; by /= 2) {
    sum.high += __shfl_xor_sync(0xffffffffu, sum.high, by);
    sum.low += __shfl_xor_sync(0xffffffffu, sum.low, by);
  }
  return sum;
}

// Adds to the slots of one sum: limbs [kWindows][kLimbs], and which windows were used.
TVFAST_STAGE void add_to_slots(unsigned long long* limbs, unsigned* used, const WindowedSum& sum) {
  if (sum.window == kNoWindow) return;
  const int slot = sum.window - kLowestWindow;
  unsigned long long* at = limbs + slot * kLimbs;
  atomicAdd(at, static_cast<unsigned long long>(sum.high & 0xffffffff));
  atomicAdd(at + 1, static_cast<unsigned long long>(sum.high >> 32));
  atomicAdd(at + 2, static_cast<unsigned long long>(sum.low & 0xffffffff));
  atomicAdd(at + 3, static_cast<unsigned long long>(sum.low >> 32));
  atomicOr(used, 1u << slot);
}

}  // namespace tvfast::gpu
