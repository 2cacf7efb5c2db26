// score: importance of every entry, added to what is there. No include guard on purpose.

// Elementwise: out + |score_k * d_k| * weight_k, models in order.
static void score_tile(const TileCall& call) {
  const Entry& entry = call.entry;
  for_each_block(call, [&](const BlockCall& block) {
    const float* base = stage_base(entry.origin(), block.begin, block.n, call.scratch);
    float* total = call.scratch.result.get(kMaxBlock + 64);
    float* tau = block.tau(0);
    widen({entry.out, DType::F32}, block.begin, block.n, total);
    for (int k = 0; k < call.n_models(); ++k) {
      const F weight = splat(call.models[k].weight);
      for_each_tau(entry.models[k], base, block.begin, block.n,
                   [tau](std::int64_t j, F x)
                       __attribute__((always_inline)) { store(tau + j, x); });
      for_each(entry.scores[k], block.begin, block.n,
               [=](std::int64_t j, F g) __attribute__((always_inline)) {
                 const F one = magnitude(g * load<F>(tau + j)) * weight;
                 store(total + j, load<F>(total + j) + one);
               });
    }
    narrow<DType::F32>(total, entry.out, block.begin, block.n, false);
  });
}

// Packs rows of activations, [depth][columns], into panels [depth][kTileColumns], zeros after the
// last column. Column `one` of the tile, if it has it, is 1.
static void pack_activations(const View& view, std::int64_t stride, std::int64_t first_token,
                             std::int64_t column, std::int64_t n_columns, std::int64_t one,
                             std::int64_t depth, float* panels) {
  const std::int64_t n_stored = one >= 0 && one < n_columns ? one : n_columns;
  const std::int64_t n_padded = (n_columns + kTileColumns - 1) / kTileColumns * kTileColumns;
  const auto at = [=](std::int64_t k, std::int64_t j) __attribute__((always_inline)) {
    return panels + (j / kTileColumns * depth + k) * kTileColumns + j % kTileColumns;
  };
  for (std::int64_t k = 0; k < depth; ++k) {
    for_each(view, (first_token + k) * stride + column, n_stored,
             [=](std::int64_t j, F x) __attribute__((always_inline)) { store(at(k, j), x); });
    for (std::int64_t j = (n_stored + kLanes - 1) / kLanes * kLanes; j < n_padded; j += kLanes)
      store(at(k, j), F{});
    if (n_stored < n_columns) *at(k, one) = 1.0f;
  }
}

// Packs rows of output gradients, [depth][n_rows], into panels [depth][kTileRows]; the places after
// the last row are not read.
static void pack_gradients(const View& view, std::int64_t stride, std::int64_t first_token,
                           std::int64_t row, std::int64_t n_rows, std::int64_t depth,
                           float* panels) {
  float widened[kFactoredRows + 64];
  for (std::int64_t k = 0; k < depth; ++k) {
    widen(view, (first_token + k) * stride + row, n_rows, widened);
    for (std::int64_t m = 0; m < n_rows; m += kTileRows)
      std::memcpy(panels + (m * depth + k * kTileRows), widened + m, kTileRows * sizeof(float));
  }
}

// One tile of a layer over all samples: theta and the accumulator stay in the second-level cache,
// and a sample's gradient in registers unless it has more than kFactoredDepth tokens.
static void factored_tile(const FactoredTile& tile) {
  const FactoredScore& score = tile.score;
  const std::int64_t n_rows = tile.row_end - tile.row_begin;
  const std::int64_t n_columns = tile.column_end - tile.column_begin;
  constexpr std::int64_t kStride = kFactoredColumns, kArea = (kFactoredRows + 16) * kStride;
  float* total =
      tile.scratch.result.get(4 * kArea + (kFactoredRows + kStride + 64) * kFactoredDepth);
  float *tau = total + kArea, *partial = tau + kArea, *base = partial + kArea;
  float *rights = base + kArea, *lefts = rights + kStride * kFactoredDepth;
  const bool square = score.model.data == nullptr;
  for (std::int64_t m = 0; m < n_rows; ++m) {
    const std::int64_t begin = (tile.row_begin + m) * score.n_in + tile.column_begin;
    widen({score.out, DType::F32}, begin, n_columns, total + m * kStride);
    if (square) continue;
    if (score.base.data != nullptr) widen(score.base, begin, n_columns, base);
    for_each_tau(score.model, score.base.data != nullptr ? base : nullptr, begin, n_columns,
                 [=](std::int64_t j, F x)
                     __attribute__((always_inline)) { store(tau + m * kStride + j, x); });
  }
  const std::int64_t n_activations = score.n_in - (score.bias_column ? 1 : 0);
  const std::int64_t one = score.bias_column ? n_activations - tile.column_begin : -1;
  for (const FactoredSample& sample : score.samples) {
    const F weight = splat(sample.weight);
    for (std::int64_t token = 0; token < sample.n_tokens; token += kFactoredDepth) {
      const std::int64_t depth = std::min(kFactoredDepth, sample.n_tokens - token);
      const bool first = token == 0, last = token + depth == sample.n_tokens;
      pack_activations(sample.activations, n_activations, token, tile.column_begin, n_columns, one,
                       depth, rights);
      pack_gradients(sample.gradients, score.n_out, token, tile.row_begin, n_rows, depth, lefts);
      for (std::int64_t n = 0; n < n_columns; n += kTileColumns) {
        for (std::int64_t m = 0; m < n_rows; m += kTileRows) {
          const std::int64_t corner = m * kStride + n;
          const auto place = [=](int row, int v) __attribute__((always_inline)) {
            return corner + row * kStride + v * kLanes;
          };
          const auto start = [=](int row, int v) __attribute__((always_inline)) {
            return first ? F{} : load<F>(partial + place(row, v));
          };
          const auto finish = [=](int row, int v, F g) __attribute__((always_inline)) {
            const std::int64_t i = place(row, v);
            if (!last) return store(partial + i, g);
            const F factor = square ? g : load<F>(tau + i);
            store(total + i, load<F>(total + i) + magnitude(g * factor) * weight);
          };
          with_rows(static_cast<int>(std::min<std::int64_t>(kTileRows, n_rows - m)),
                    [&](auto rows) __attribute__((always_inline)) {
                      multiply_tile<rows(), kTileVectors, 1, kTileRows>(
                          lefts + m * depth, rights + n * depth, kTileColumns, depth, start,
                          finish);
                    });
        }
      }
    }
  }
  for (std::int64_t m = 0; m < n_rows; ++m)
    narrow<DType::F32>(total + m * kStride, score.out + (tile.row_begin + m) * score.n_in,
                       tile.column_begin, n_columns, false);
}
