// What `measure` returns of one entry, and which of it was asked for.
#pragma once

#include <cstdint>
#include <vector>

#include "accumulate.hpp"

namespace tvfast {

struct Moments {
  std::vector<BinnedSum> l1_before, l1, gram;  // [K], [K], [K * K] upper triangle
  std::vector<BinnedSum> dots;                 // [K] with the entry's scores
  std::vector<std::int64_t> n_kept, n_nonzero, n_nonfinite, n_alone;
  std::int64_t n_base_nonfinite = 0, elected = 0, n_conflict = 0;
};

enum Wants : unsigned {
  L1_BEFORE = 1,
  L1 = 2,
  GRAM = 4,
  COUNTS = 8,
  VOTES = 16,
  SQUARES = 32,
  DOTS = 64,
  ALONE = 128,
  LAST = 256,
};

}  // namespace tvfast
