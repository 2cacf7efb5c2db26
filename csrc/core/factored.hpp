// Gradients and curvature of linear layers in factored form. Twin of tvfast/factored.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "program.hpp"

namespace tvfast {

// One sample of a linear layer: its gradient is the sum over tokens of e_r a_r^T.
struct FactoredSample {
  View gradients;    // e, [n_tokens, n_out]
  View activations;  // a, [n_tokens, n_in], or one column less with a bias column
  std::int64_t n_tokens = 0;
  float weight = 1.0f;
};

// Per-sample scores of one layer, added to `out`: |theta * G|, with a base |(theta - base) * G|,
// without a model G^2.
struct FactoredScore {
  View model, base;      // [n_out, n_in] or none
  float* out = nullptr;  // [n_out, n_in]
  std::int64_t n_out = 0, n_in = 0;
  bool bias_column = false;  // the last column's activation is 1 for every token
  std::vector<FactoredSample> samples;
};

// Diagonal blocks of a square matrix, the last possibly smaller; each is a square by rows or, if
// `packed`, the lower triangle of a symmetric one by rows.
struct BlockDiagonal {
  std::vector<View> blocks;
  std::int64_t side = 0, block = 0;
  bool packed = false;

  std::int64_t n_blocks() const { return static_cast<std::int64_t>(blocks.size()); }
  std::int64_t begin(std::int64_t i) const { return std::min(i * block, side); }
};

// Blocks up to this side are multiplied by the fused kernels.
inline constexpr std::int64_t kLargestBlock = 128;

// P = B X A for block-diagonal A and B. `out` becomes scale P, or what it was plus scale P.
struct KroneckerProduct {
  View x;               // [n_out, n_in]
  void* out = nullptr;  // [n_out, n_in] or none
  DType out_dtype = DType::F32;
  std::int64_t n_out = 0, n_in = 0;
  BlockDiagonal a, b;
  float scale = 1.0f;
  bool accumulate = false;
};

// Rows of a product that is already there: its dot product with x, and where it goes.
struct ProductPanel {
  View x;                          // row r begins at element r * x_stride
  const float* product = nullptr;  // row r begins at r * product_stride
  void* out = nullptr;             // or none
  DType out_dtype = DType::F32;
  std::int64_t n_rows = 0, n_columns = 0;
  std::int64_t x_stride = 0, product_stride = 0, out_stride = 0;
  float scale = 1.0f;
  bool accumulate = false;
};

}  // namespace tvfast
