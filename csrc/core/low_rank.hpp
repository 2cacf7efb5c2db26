// A matrix plus a product of two thin ones, as adapters give it.
#pragma once

#include <cstdint>

#include "program.hpp"

namespace tvfast {

// out = round(W + factor * (L R)): the product is a chain of fused multiply-adds over the rank,
// ascending, from +0; then a multiplication and an addition in fp32, and one rounding.
struct LowRankSum {
  View matrix;          // element `first` of W, row-major
  void* out = nullptr;  // element `first` of the result; may be the matrix
  DType out_dtype = DType::F32;
  std::int64_t first = 0;  // index of the element that the addresses are of
  std::int64_t n_columns = 0;
  std::int64_t rank = 0;
  float factor = 1.0f;
  View left;  // L(m, k) is at (m - left_first) * left_row + k * left_step; one of these is 1
  std::int64_t left_first = 0, left_row = 0, left_step = 1;
  View right;  // R(k, n) is at k * right_step + n * right_column; one of these is 1
  std::int64_t right_step = 0, right_column = 1;
};

}  // namespace tvfast
