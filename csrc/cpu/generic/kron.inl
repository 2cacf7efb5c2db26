// kron: blocks of B X A while they are in the cache. No include guard on purpose.

// Rows of the staged tiles; a row has room for the lanes after its last column.
inline constexpr std::int64_t kKronStride = kLargestBlock + 16;
inline constexpr std::int64_t kKronArea = kLargestBlock * kKronStride;
static_assert(kLargestBlock * kLargestBlock <= 1 << 14, "add_block sums a tile exactly");

// C = L R for [n_rows, depth] and [depth, n_columns], all by rows of kKronStride. Lanes after the
// last column hold anything.
static void multiply_staged(const float* left, const float* right, std::int64_t n_rows,
                            std::int64_t n_columns, std::int64_t depth, float* c) {
  constexpr int kStride = kKronStride;
  const auto start = [](int, int) __attribute__((always_inline)) { return F{}; };
  const auto columns = [&](auto vectors, std::int64_t n) __attribute__((always_inline)) {
    in_even_parts(n_rows, kTileRows, [&](std::int64_t m, std::int64_t part) {
      float* corner = c + m * kStride + n;
      const auto finish = [=](int row, int v, F x) __attribute__((always_inline)) {
        store(corner + row * kStride + v * kLanes, x);
      };
      with_rows(static_cast<int>(part), [&](auto rows) __attribute__((always_inline)) {
        multiply_tile<rows(), vectors(), kStride, 1>(left + m * kStride, right + n, kStride, depth,
                                                     start, finish);
      });
    });
  };
  for (std::int64_t n = 0; n < n_columns;) {
    // The store of a tile reaches less than a vector beyond the last column.
    if (n_columns - n > kLanes) {
      columns(std::integral_constant<int, 2>{}, n);
      n += 2 * kLanes;
    } else {
      columns(std::integral_constant<int, 1>{}, n);
      n += kLanes;
    }
  }
}

// Block i, by rows of kKronStride.
static void stage_diagonal(const BlockDiagonal& factor, std::int64_t i, float* out) {
  const std::int64_t size = factor.begin(i + 1) - factor.begin(i);
  const View& block = factor.blocks[i];
  if (!factor.packed) {
    for (std::int64_t m = 0; m < size; ++m) widen(block, m * size, size, out + m * kKronStride);
    return;
  }
  for (std::int64_t m = 0; m < size; ++m)
    widen(block, m * (m + 1) / 2, m + 1, out + m * kKronStride);
  for (std::int64_t m = 0; m < size; ++m)
    for (std::int64_t k = 0; k < m; ++k) out[k * kKronStride + m] = out[m * kKronStride + k];
}

// Writes scale * product, or adds it to what is there.
template <DType dtype>
static void finish_row(const float* product, void* out, std::int64_t begin, std::int64_t n,
                       float factor, bool accumulate) {
  const F scale = splat(factor);
  const auto result = [=](std::int64_t j, F old) __attribute__((always_inline)) {
    const F p = load<F>(product + j) * scale;
    return accumulate ? old + p : p;
  };
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    store_rounded<dtype, false>(out, begin + j,
                                result(j, accumulate ? load_as_float<dtype>(out, begin + j) : F{}));
  if (j == n) return;
  const int rest = static_cast<int>(n - j);
  const F p = load_partial<DType::F32>(product, j, rest) * scale;
  const F old = accumulate ? load_partial<dtype>(out, begin + j, rest) : F{};
  store_partial<dtype>(out, begin + j, accumulate ? old + p : p, rest);
}

static void finish_row(const float* product, void* out, DType dtype, std::int64_t begin,
                       std::int64_t n, float scale, bool accumulate) {
  switch (dtype) {
    case DType::F32: return finish_row<DType::F32>(product, out, begin, n, scale, accumulate);
    case DType::BF16: return finish_row<DType::BF16>(product, out, begin, n, scale, accumulate);
    case DType::F16: return finish_row<DType::F16>(product, out, begin, n, scale, accumulate);
  }
}

// Sets the columns from n to `until` of every row to zero.
static void clear_columns(float* rows, std::int64_t n_rows, std::int64_t n, std::int64_t until) {
  if (n >= until) return;
  for (std::int64_t m = 0; m < n_rows; ++m)
    std::fill(rows + m * kKronStride + n, rows + m * kKronStride + until, 0.0f);
}

// Adds the exact products of two staged tiles of at most kLargestBlock columns to the sum; columns
// up to a power of two of them are zero in both.
TVFAST_INLINE void add_products(const float* x, const float* p, std::int64_t n_rows,
                                std::int64_t n_columns, BinnedSum& dot) {
  const int shift =
      std::bit_width(static_cast<std::uint64_t>(std::max<std::int64_t>(n_columns, kLanes)) - 1);
  const std::int64_t mask = (std::int64_t{1} << shift) - 1;
  add_block(dot, n_rows << shift, [=](std::int64_t j) __attribute__((always_inline)) {
    const std::int64_t i = (j >> shift) * kKronStride + (j & mask);
    return widened(x + i) * widened(p + i);
  });
}

// Whole blocks of P: rows of blocks [b_begin, b_end) of B, columns of blocks [a_begin, a_end) of A.
static void kron_tile(const KronTile& tile, BinnedSum& dot) {
  const KroneckerProduct& product = tile.product;
  const std::int64_t row = product.b.begin(tile.b_begin), column = product.a.begin(tile.a_begin);
  const std::int64_t n_rows = product.b.begin(tile.b_end) - row;
  const std::int64_t n_columns = product.a.begin(tile.a_end) - column;
  float* x = tile.scratch.result.get(5 * kKronArea);
  float *t = x + kKronArea, *p = t + kKronArea, *a = p + kKronArea, *b = a + kKronArea;
  for (std::int64_t m = 0; m < n_rows; ++m)
    widen(product.x, (row + m) * product.n_in + column, n_columns, x + m * kKronStride);
  // What a block's product leaves in the lanes after it is overwritten by the next block's.
  for (std::int64_t i = tile.a_begin; i < tile.a_end; ++i) {
    const std::int64_t at = product.a.begin(i) - column,
                       size = product.a.begin(i + 1) - product.a.begin(i);
    stage_diagonal(product.a, i, a);
    multiply_staged(x + at, a, n_rows, size, size, t + at);
  }
  for (std::int64_t i = tile.b_begin; i < tile.b_end; ++i) {
    const std::int64_t at = product.b.begin(i) - row,
                       size = product.b.begin(i + 1) - product.b.begin(i);
    stage_diagonal(product.b, i, b);
    multiply_staged(b, t + at * kKronStride, size, n_columns, size, p + at * kKronStride);
  }
  const std::int64_t padded = static_cast<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>(std::max<std::int64_t>(n_columns, kLanes))));
  clear_columns(x, n_rows, n_columns, padded);
  clear_columns(p, n_rows, n_columns, padded);
  add_products(x, p, n_rows, n_columns, dot);
  if (product.out == nullptr) return;
  for (std::int64_t m = 0; m < n_rows; ++m)
    finish_row(p + m * kKronStride, product.out, product.out_dtype,
               (row + m) * product.n_in + column, n_columns, product.scale, product.accumulate);
}

// Rows [begin, end) of a panel.
static void finish_rows(const ProductPanel& panel, std::int64_t begin, std::int64_t end,
                        Scratch& scratch, BinnedSum& dot) {
  float* x = scratch.base.get(kMaxBlock + 64);
  for (std::int64_t m = begin; m < end; ++m) {
    for (std::int64_t n = 0; n < panel.n_columns; n += kMaxBlock) {
      const std::int64_t length = std::min(kMaxBlock, panel.n_columns - n);
      const float* p = panel.product + m * panel.product_stride + n;
      widen(panel.x, m * panel.x_stride + n, length, x);
      const std::int64_t whole = length / kLanes * kLanes;
      add_block(dot, whole, [=](std::int64_t j) __attribute__((always_inline)) {
        return widened(x + j) * widened(p + j);
      });
      for (std::int64_t j = whole; j < length; ++j)
        dot.add(static_cast<double>(x[j]) * static_cast<double>(p[j]));
      if (panel.out != nullptr)
        finish_row(p, panel.out, panel.out_dtype, m * panel.out_stride + n, length, panel.scale,
                   panel.accumulate);
    }
  }
}
