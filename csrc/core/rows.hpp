// Matrices whose rows are those of other matrices in another order, and what stands for rows that
// a matrix does not have.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.hpp"

namespace tvfast {

// What an absent row is filled with: the same row of source `fill` >= 0, or one of these, or row
// kConstant - fill of the source's constants.
inline constexpr std::int32_t kZeroRow = -1, kMeanRow = -2, kConstant = -3;

// One matrix in a file, and the matrix that is made of its rows.
struct RowSource {
  int descriptor = -1;
  std::int64_t offset = 0;             // of the matrix in the file, bytes
  const void* shown = nullptr;         // the matrix where it stands in memory; null: it is read
  DType stored = DType::F32;           // in the file
  const std::int32_t* rows = nullptr;  // of each new row: the row in the file; negative: absent
  const void* constants = nullptr;     // rows of the new storage type
  void* out = nullptr;                 // the elements of the window
};

// Elements [start, start + n) of new matrices with `row` elements a row, all of storage type
// `dtype`: a source's own type, or float32.
struct RowGather {
  std::vector<RowSource> sources;
  const std::int32_t* fill = nullptr;  // of each new row
  DType dtype = DType::F32;
  std::int64_t row = 0, start = 0, n = 0;
};

// Why a file could not be read: an error number, or 0 where it ended early; `at` is the position
// in the file.
struct RowFailure {
  int source = -1;  // < 0: there was none
  int code = 0;
  std::int64_t at = 0;
};

}  // namespace tvfast
