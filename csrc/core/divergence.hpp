// How far the rows of one matrix are from those of another, read as distributions, and what of one
// is taken over into the other.
#pragma once

#include <cstdint>

#include "program.hpp"

namespace tvfast {

// Row r of both is [r * length, (r + 1) * length); p = softmax of a row of `of` + floor, q the same
// of `from`, and the divergence is the sum of p log(p / q).
struct Divergence {
  View of, from;
  std::int64_t n_rows = 0, length = 0;
  double floor = 1e-8;    // above 0
  double* out = nullptr;  // [n_rows]
  // [n_rows * length], or null: |of - from| times the divergence of the row, at least 0, in fp32
  float* importances = nullptr;
};

// from + (of - from) * taken * scale, one rounding a step; taken is 1 where the importance is at
// least `least`, otherwise 0.
struct Fusion {
  View of, from;
  float least = 0.0f, scale = 1.0f;
  float* importances = nullptr;  // becomes the result
};

}  // namespace tvfast
