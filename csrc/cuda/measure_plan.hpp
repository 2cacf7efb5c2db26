// Where the statistics of an entry lie, on the device and in the host's copy. Host only and pure,
// except that kernels number their sums and counts by it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing.hpp"
#include "sum_slots.hpp"

namespace tvfast::gpu {

// Sums of an entry: L1 before [K], L1 [K], products [K][K] of which j <= k are filled, products
// with scores [K].
struct SumNumbers {
  int n_models;
  constexpr int l1_before(int k) const { return k; }
  constexpr int l1(int k) const { return n_models + k; }
  constexpr int product(int j, int k) const { return (2 + j) * n_models + k; }
  constexpr int dot(int k) const { return (2 + n_models) * n_models + k; }
  constexpr int size() const { return (3 + n_models) * n_models; }
};

// Counts of an entry: kept, non-zero, non-finite and alone [K] each, then three of the entry.
struct CountNumbers {
  int n_models;
  constexpr int kept(int k) const { return k; }
  constexpr int nonzero(int k) const { return n_models + k; }
  constexpr int nonfinite(int k) const { return 2 * n_models + k; }
  constexpr int alone(int k) const { return 3 * n_models + k; }
  constexpr int base_nonfinite() const { return 4 * n_models; }
  constexpr int elected() const { return 4 * n_models + 1; }
  constexpr int conflicts() const { return 4 * n_models + 2; }
  constexpr int size() const { return 4 * n_models + 3; }
};

// The parts of the workspace that Gathered of measure.cu points to.
struct GatheredLayout {
  std::size_t limbs, nonfinite, used, counts;
  GatheredLayout(std::int64_t n_entries, int n_models) {
    const auto n_sums = static_cast<std::size_t>(n_entries) * SumNumbers{n_models}.size();
    limbs = aligned(n_sums * kWindows * kLimbs * sizeof(unsigned long long));
    nonfinite = aligned(n_sums * sizeof(double));
    used = aligned(n_sums * sizeof(unsigned));
    counts = aligned(static_cast<std::size_t>(n_entries) * CountNumbers{n_models}.size() *
                     sizeof(unsigned long long));
  }
  std::size_t size() const { return limbs + nonfinite + used + counts; }
  template <class Byte>
  auto at(Byte* start) const {
    struct {
      Byte *limbs, *nonfinite, *used, *counts;
    } found{start, start + limbs, start + limbs + nonfinite, start + limbs + nonfinite + used};
    return found;
  }
};

}  // namespace tvfast::gpu
