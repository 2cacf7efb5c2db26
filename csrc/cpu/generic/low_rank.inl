// W + factor * L R. No include guard on purpose.

// Packs `depth` rows of `n` elements into panels [depth][width]: element (k, j) of the source is at
// begin + k * step + j * stride, and one of the strides is 1. Places from n on are zero.
template <std::int64_t width>
static void pack_panel(const View& view, std::int64_t begin, std::int64_t step, std::int64_t stride,
                       std::int64_t depth, std::int64_t n, float* row, float* panel) {
  if (n < width) std::fill(panel, panel + depth * width, 0.0f);
  if (stride == 1) {
    for (std::int64_t k = 0; k < depth; ++k) {
      widen(view, begin + k * step, n, row);
      std::memcpy(panel + k * width, row, n * sizeof(float));
    }
    return;
  }
  for (std::int64_t j = 0; j < n; ++j) {
    widen(view, begin + j * stride, depth, row);
    for (std::int64_t k = 0; k < depth; ++k) panel[k * width + j] = row[k];
  }
}

// out = W + factor * product for `n` elements of a row.
template <DType dtype>
static void finish_low_rank(const float* product, const View& matrix, void* out, std::int64_t i,
                            std::int64_t n, float factor, float* row) {
  const F scale = splat(factor);
  for_each(matrix, i, n, [=](std::int64_t j, F w) __attribute__((always_inline)) {
    store(row + j, w + load<F>(product + j) * scale);
  });
  narrow<dtype>(row, out, i, n, false);
}

static void add_low_rank_tile(const LowRankTile& tile) {
  const LowRankSum& sum = tile.sum;
  const std::int64_t depth = sum.rank, n_rows = tile.row_end - tile.row_begin;
  const std::int64_t n_columns = tile.column_end - tile.column_begin;
  const std::int64_t padded = (n_columns + kTileColumns - 1) / kTileColumns * kTileColumns;
  float* product = tile.scratch.result.get(kTileRows * padded + 64);
  float* rights = tile.scratch.rows.get(depth * padded + 64);
  float* left = tile.scratch.taus.get(depth * kTileRows + 64);
  float* row = tile.scratch.base.get(std::max(depth, padded) + 64);
  for (std::int64_t n = 0; n < n_columns; n += kTileColumns)
    pack_panel<kTileColumns>(
        sum.right, (tile.column_begin + n) * sum.right_column, sum.right_step, sum.right_column,
        depth, std::min<std::int64_t>(kTileColumns, n_columns - n), row, rights + n * depth);
  const auto start = [](int, int) __attribute__((always_inline)) { return F{}; };
  for (std::int64_t m = 0; m < n_rows; m += kTileRows) {
    const std::int64_t here = std::min<std::int64_t>(kTileRows, n_rows - m);
    pack_panel<kTileRows>(sum.left, (tile.row_begin + m - sum.left_first) * sum.left_row,
                          sum.left_step, sum.left_row, depth, here, row, left);
    with_rows(static_cast<int>(here), [&](auto rows) __attribute__((always_inline)) {
      for (std::int64_t n = 0; n < n_columns; n += kTileColumns) {
        float* corner = product + n;
        const auto finish = [=](int line, int v, F x) __attribute__((always_inline)) {
          store(corner + line * padded + v * kLanes, x);
        };
        multiply_tile<rows(), kTileVectors, 1, kTileRows>(left, rights + n * depth, kTileColumns,
                                                          depth, start, finish);
      }
    });
    for (std::int64_t line = 0; line < here; ++line) {
      const float* p = product + line * padded;
      const std::int64_t i =
          (tile.row_begin + m + line) * sum.n_columns + tile.column_begin - sum.first;
      switch (sum.out_dtype) {
        case DType::F32:
          finish_low_rank<DType::F32>(p, sum.matrix, sum.out, i, n_columns, sum.factor, row);
          break;
        case DType::BF16:
          finish_low_rank<DType::BF16>(p, sum.matrix, sum.out, i, n_columns, sum.factor, row);
          break;
        case DType::F16:
          finish_low_rank<DType::F16>(p, sum.matrix, sum.out, i, n_columns, sum.factor, row);
          break;
      }
    }
  }
}
