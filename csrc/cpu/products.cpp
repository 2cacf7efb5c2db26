// The loops over tiles of layers. A tile writes its own entries, and dot products do not depend on
// order, so tiles may run anywhere.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "api.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace tvfast {

namespace {

struct Span {
  std::int64_t begin, end;
};

std::vector<Span> spans(std::int64_t n, std::int64_t length) {
  std::vector<Span> result;
  for (std::int64_t begin = 0; begin < n; begin += length)
    result.push_back({begin, std::min(begin + length, n)});
  return result;
}

void check_blocks(const BlockDiagonal& factor) {
  if (factor.block < 1 || factor.block > kLargestBlock)
    throw std::invalid_argument("blocks of " + std::to_string(factor.block) +
                                " a side; the fused product takes 1 to " +
                                std::to_string(kLargestBlock));
}

// Rows of a finished panel that a thread takes at a time.
constexpr std::int64_t kPanelRows = 64;

// Adds the sums that threads have made.
struct Dots {
  explicit Dots(std::size_t n_threads) : of_thread(n_threads) {}
  std::vector<BinnedSum> of_thread;

  BinnedSum total() const {
    BinnedSum sum;
    for (const BinnedSum& one : of_thread) sum.add(one);
    return sum;
  }
};

double kron_of(const KroneckerProduct& product, const Kernels& kernels, const Options& options) {
  check_blocks(product.a);
  check_blocks(product.b);
  // Small blocks share a tile. Of those of A more, so that long rows of X are read; and a block of
  // A that fills a tile meets the blocks of B in turn.
  const std::int64_t n_b = std::max<std::int64_t>(1, kLargestBlock / 2 / product.b.block);
  const std::int64_t n_a = std::max<std::int64_t>(1, kLargestBlock / product.a.block);
  const std::vector<Span> rows = spans(product.b.n_blocks(), n_b);
  const std::vector<Span> columns = spans(product.a.n_blocks(), n_a);
  const std::int64_t n_tiles = static_cast<std::int64_t>(rows.size() * columns.size());
  const int n_threads = parallel_threads(n_tiles, options.n_threads);
  std::vector<Scratch> scratch(n_threads);
  Dots dots(n_threads);
  parallel_for(n_tiles, n_threads, [&](std::int64_t task, int thread) {
    const Span& b = rows[task / columns.size()];
    const Span& a = columns[task % columns.size()];
    kernels.kron({product, b.begin, b.end, a.begin, a.end, scratch[thread]},
                 dots.of_thread[thread]);
  });
  return dots.total().value();
}

}  // namespace

void score_factored(const std::vector<FactoredScore>& scores, const Options& options) {
  const Kernels& kernels = kernels_for(options.isa);
  for (const FactoredScore& score : scores) {
    const std::vector<Span> rows = spans(score.n_out, kFactoredRows);
    const std::vector<Span> columns = spans(score.n_in, kFactoredColumns);
    const std::int64_t n_tiles = static_cast<std::int64_t>(rows.size() * columns.size());
    const int n_threads = parallel_threads(n_tiles, options.n_threads);
    std::vector<Scratch> scratch(n_threads);
    parallel_for(n_tiles, n_threads, [&](std::int64_t task, int thread) {
      const Span& row = rows[task / columns.size()];
      const Span& column = columns[task % columns.size()];
      kernels.factored({score, row.begin, row.end, column.begin, column.end, scratch[thread]});
    });
  }
}

std::vector<double> kron(const std::vector<KroneckerProduct>& products, const Options& options) {
  const Kernels& kernels = kernels_for(options.isa);
  std::vector<double> dots;
  for (const KroneckerProduct& product : products)
    dots.push_back(kron_of(product, kernels, options));
  return dots;
}

void finish_product(const ProductPanel& panel, BinnedSum& dot, const Options& options) {
  const Kernels& kernels = kernels_for(options.isa);
  const std::vector<Span> rows = spans(panel.n_rows, kPanelRows);
  const std::int64_t n_tiles = static_cast<std::int64_t>(rows.size());
  const int n_threads = parallel_threads(n_tiles, options.n_threads);
  std::vector<Scratch> scratch(n_threads);
  Dots dots(n_threads);
  parallel_for(n_tiles, n_threads, [&](std::int64_t task, int thread) {
    kernels.finish_rows(panel, rows[task].begin, rows[task].end, scratch[thread],
                        dots.of_thread[thread]);
  });
  dot.add(dots.total());
}

}  // namespace tvfast
