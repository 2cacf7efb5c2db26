// score_factored, kron and finish_product against their chains of fused multiply-adds, on memory
// that ends where the operands do.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "cpu/api.hpp"

namespace {

using namespace tvfast;
using Matrix = std::vector<float>;  // by rows

std::mt19937 generator(11);

Matrix random_matrix(std::int64_t n) {
  std::normal_distribution<float> normal;
  Matrix values(static_cast<std::size_t>(n));
  for (float& x : values) x = normal(generator);
  return values;
}

View view(const Matrix& matrix) { return {matrix.data(), DType::F32}; }

bool same(const Matrix& a, const Matrix& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check_scores(std::int64_t n_out, std::int64_t n_in, std::int64_t n_tokens, bool bias,
                  int n_threads) {
  const Options options{"", n_threads, 0};
  const std::int64_t n_stored = n_in - (bias ? 1 : 0);
  const Matrix theta = random_matrix(n_out * n_in), start = random_matrix(n_out * n_in);
  const Matrix e = random_matrix(n_tokens * n_out), a = random_matrix(n_tokens * n_stored);
  Matrix expected = start, out = start;
  for (std::int64_t m = 0; m < n_out; ++m) {
    for (std::int64_t n = 0; n < n_in; ++n) {
      float g = 0.0f;
      for (std::int64_t k = 0; k < n_tokens; ++k)
        g = std::fma(e[k * n_out + m], n < n_stored ? a[k * n_stored + n] : 1.0f, g);
      expected[m * n_in + n] += std::fabs(g * theta[m * n_in + n]) * 0.3f;
    }
  }
  FactoredScore score;
  score.model = view(theta);
  score.out = out.data();
  score.n_out = n_out;
  score.n_in = n_in;
  score.bias_column = bias;
  score.samples = {{view(e), view(a), n_tokens, 0.3f}};
  score_factored({score}, options);
  CHECK(same(out, expected));
}

BlockDiagonal factor(const std::vector<Matrix>& blocks, std::int64_t side, std::int64_t block) {
  BlockDiagonal result{{}, side, block, false};
  for (const Matrix& one : blocks) result.blocks.push_back(view(one));
  return result;
}

std::vector<Matrix> random_blocks(std::int64_t side, std::int64_t block) {
  std::vector<Matrix> blocks;
  for (std::int64_t begin = 0; begin < side; begin += block) {
    const std::int64_t size = std::min(block, side - begin);
    blocks.push_back(random_matrix(size * size));
  }
  return blocks;
}

void check_kron(std::int64_t n_out, std::int64_t n_in, std::int64_t block, int n_threads) {
  const Options options{"", n_threads, 0};
  const Matrix x = random_matrix(n_out * n_in);
  const std::vector<Matrix> a = random_blocks(n_in, block), b = random_blocks(n_out, block);
  Matrix half(x.size()), expected(x.size()), out(x.size());
  for (std::int64_t m = 0; m < n_out; ++m) {
    for (std::int64_t n = 0; n < n_in; ++n) {
      const std::int64_t begin = n / block * block, size = std::min(block, n_in - begin);
      float sum = 0.0f;
      for (std::int64_t k = 0; k < size; ++k)
        sum = std::fma(x[m * n_in + begin + k], a[n / block][k * size + n - begin], sum);
      half[m * n_in + n] = sum;
    }
  }
  BinnedSum dot;
  for (std::int64_t m = 0; m < n_out; ++m) {
    for (std::int64_t n = 0; n < n_in; ++n) {
      const std::int64_t begin = m / block * block, size = std::min(block, n_out - begin);
      float sum = 0.0f;
      for (std::int64_t k = 0; k < size; ++k)
        sum = std::fma(b[m / block][(m - begin) * size + k], half[(begin + k) * n_in + n], sum);
      expected[m * n_in + n] = sum;
      dot.add(static_cast<double>(x[m * n_in + n]) * static_cast<double>(sum));
    }
  }
  const KroneckerProduct product{
      view(x), out.data(), DType::F32, n_out, n_in, factor(a, n_in, block), factor(b, n_out, block),
      1.0f,    false};
  const std::vector<double> dots = kron({product}, options);
  CHECK(dots.at(0) == dot.value());
  CHECK(same(out, expected));

  Matrix finished(x.size());
  const ProductPanel panel{
      view(x), out.data(), finished.data(), DType::F32, n_out, n_in, n_in, n_in, n_in, 1.0f, false};
  BinnedSum total;
  finish_product(panel, total, options);
  CHECK(total.value() == dot.value());
  CHECK(same(finished, expected));
}

}  // namespace

int main() {
  return run([] {
    for (const int n_threads : {1, 3}) {
      for (const bool bias : {false, true}) {
        check_scores(1, 2, 1, bias, n_threads);
        check_scores(13, 33, 5, bias, n_threads);
        check_scores(kFactoredRows + 1, kFactoredColumns + 1, kFactoredDepth + 3, bias, n_threads);
      }
      for (const std::int64_t block : {1, 3, 16, 17, 64, 100, 127, 128})
        check_kron(block + 5, 2 * block + 1, block, n_threads);
      check_kron(150, 270, 31, n_threads);
    }
    Matrix x(4);
    const std::vector<Matrix> one = {Matrix(4)};
    const BlockDiagonal large{{view(one[0])}, 2, kLargestBlock + 1, false};
    CHECK([&] {
      try {
        kron({{view(x), nullptr, DType::F32, 2, 2, large, large, 1.0f, false}}, {});
      } catch (const std::invalid_argument&) {
        return true;
      }
      return false;
    }());
  });
}
