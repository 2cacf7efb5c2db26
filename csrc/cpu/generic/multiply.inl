// A register tile of a matrix product. No include guard on purpose.
//
// C(m, n) is a chain over k ascending, one fused multiply-add a step, from +0: docs/numerics.md,
// "Products". Tiles, panels and padding change which elements are computed together, never a chain.

// Accumulators, one row of the right operand and a broadcast fill the vector registers.
inline constexpr int kTileRows = kLanes >= 16 ? 14 : kLanes == 8 ? 6 : 4;
inline constexpr int kTileVectors = 2;
inline constexpr int kTileColumns = kTileVectors * kLanes;

// Goes on with `depth` steps of the chains that start(m, v) gives, and hands them to finish(m, v,
// c). L(m, k) is left[m * left_row + k * left_step], constants so that one address serves all rows.
template <int rows, int vectors, int left_row, int left_step, class Start, class Finish>
TVFAST_INLINE void multiply_tile(const float* left, const float* right, std::int64_t right_step,
                                 std::int64_t depth, Start&& start, Finish&& finish) {
  F c[rows][vectors];
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) c[m][v] = start(m, v);
  for (std::int64_t k = 0; k < depth; ++k) {
    F r[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) r[v] = load<F>(right + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      const F l = splat(left[m * left_row]);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) c[m][v] = fused_add(l, r[v], c[m][v]);
    }
    left += left_step;
    right += right_step;
  }
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) finish(m, v, c[m][v]);
}

// Calls fn with the row count as a constant, 1 <= rows <= kTileRows.
template <int most = kTileRows, class Fn>
TVFAST_INLINE void with_rows(int rows, Fn&& fn) {
  if constexpr (most > 1) {
    if (rows != most) return with_rows<most - 1>(rows, fn);
  }
  fn(std::integral_constant<int, most>{});
}

// `n` cut into as few parts of at most `most` as possible, as even as possible; fn(begin, length).
template <class Fn>
TVFAST_INLINE void in_even_parts(std::int64_t n, std::int64_t most, Fn&& fn) {
  const std::int64_t n_parts = (n + most - 1) / most;
  for (std::int64_t part = 0, begin = 0; part < n_parts; ++part) {
    const std::int64_t end = (part + 1) * n / n_parts;
    fn(begin, end - begin);
    begin = end;
  }
}
