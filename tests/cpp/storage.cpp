// Low-rank sums and blocks of 8-bit codes on memory that ends where the operands do, in any cut.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "cpu/api.hpp"

namespace {

using namespace tvfast;
using Matrix = std::vector<float>;  // by rows

std::mt19937 generator(5);

Matrix random_matrix(std::int64_t n) {
  std::normal_distribution<float> normal;
  Matrix values(static_cast<std::size_t>(n));
  for (float& x : values) x = normal(generator);
  return values;
}

View view(const Matrix& matrix) { return {matrix.data(), DType::F32}; }

Matrix piece(const Matrix& whole, std::int64_t begin, std::int64_t end) {
  return Matrix(whole.begin() + begin, whole.begin() + end);
}

void check_low_rank(std::int64_t rows, std::int64_t columns, std::int64_t rank, bool turned,
                    int n_threads) {
  const Matrix w = random_matrix(rows * columns);
  const Matrix left = random_matrix(rows * rank), right = random_matrix(rank * columns);
  LowRankSum sum;
  sum.n_columns = columns;
  sum.rank = rank;
  sum.factor = 0.75f;
  sum.left = view(left);
  sum.right = view(right);
  sum.left_row = turned ? 1 : rank;
  sum.left_step = turned ? rows : 1;
  sum.right_step = turned ? 1 : columns;
  sum.right_column = turned ? rank : 1;
  Matrix expected(w.size());
  for (std::int64_t m = 0; m < rows; ++m)
    for (std::int64_t n = 0; n < columns; ++n) {
      float c = 0.0f;
      for (std::int64_t k = 0; k < rank; ++k)
        c = std::fma(left[m * sum.left_row + k * sum.left_step],
                     right[k * sum.right_step + n * sum.right_column], c);
      expected[m * columns + n] = w[m * columns + n] + c * sum.factor;
    }
  const std::int64_t n = rows * columns;
  for (const auto& [begin, end] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {0, n}, {n / 3, n - n / 4}, {n - 1, n}, {0, 1}, {n, n}}) {
    Matrix part = piece(w, begin, end);
    sum.first = begin;
    sum.matrix = view(part);
    sum.out = part.data();
    sum.out_dtype = DType::F32;
    add_low_rank(sum, begin, end, {"", n_threads, 0});
    CHECK(part == piece(expected, begin, end));
  }
}

void check_codes(std::int64_t n_matrices, std::int64_t rows, std::int64_t columns,
                 std::int64_t block_rows, std::int64_t block_columns, Fp8 format, int n_threads) {
  const ScaledBlocks blocks{format, rows, columns, block_rows, block_columns, ScaleType::F32};
  const Options options{"", n_threads, 0};
  const std::int64_t n = n_matrices * rows * columns;
  const Matrix values = random_matrix(n);
  std::vector<std::uint8_t> codes(n);
  Matrix factors(n_matrices * blocks.blocks_down() * blocks.blocks_across());
  narrow_scaled(blocks, values.data(), 0, n, false, codes.data(), factors.data(), options);
  Matrix wide(n);
  widen_scaled(blocks, codes.data(), factors.data(), 0, 0, n, wide.data(), options);
  const float step = format == Fp8::E4M3 ? 0x1p-4f : 0x1p-3f;
  for (std::int64_t i = 0; i < n; ++i)
    CHECK(std::fabs(wide[i] - values[i]) <= std::fabs(values[i]) * step * 1.001f + 1e-2f * step);
  for (const auto& [begin, end] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{n / 3, n - n / 4}, {n - 1, n}, {0, 1}}) {
    const std::int64_t row = begin / columns;
    const std::int64_t first = row / rows * blocks.blocks_down() + row % rows / block_rows;
    const std::vector<std::uint8_t> part(codes.begin() + begin, codes.begin() + end);
    const Matrix rest(factors.begin() + first * blocks.blocks_across(), factors.end());
    Matrix found(end - begin);
    widen_scaled(blocks, part.data(), rest.data(), first, begin, end, found.data(), options);
    CHECK(found == piece(wide, begin, end));
  }
}

}  // namespace

int main() {
  return run([] {
    for (const int n_threads : {1, 3}) {
      for (const bool turned : {false, true}) {
        check_low_rank(1, 1, 1, turned, n_threads);
        check_low_rank(17, 33, 5, turned, n_threads);
        check_low_rank(kLowRankRows + 3, low_rank_columns(64) + 1, 64, turned, n_threads);
      }
      for (const Fp8 format : {Fp8::E4M3, Fp8::E5M2}) {
        check_codes(1, 130, 70, 128, 128, format, n_threads);
        check_codes(3, 9, 21, 4, 5, format, n_threads);
        check_codes(1, 40, 33, 1, 33, format, n_threads);
        check_codes(1, 7, 5, 7, 5, format, n_threads);
      }
    }
  });
}
