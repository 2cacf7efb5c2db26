// The loop over tiles of a low-rank sum: elements of consecutive rows, the first and the last of
// which may be cut.
#include <algorithm>
#include <vector>

#include "api.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace tvfast {

namespace {

struct Rectangle {
  std::int64_t row_begin, row_end, column_begin, column_end;
};

// [begin, end) as rectangles of at most one tile each.
std::vector<Rectangle> rectangles(std::int64_t begin, std::int64_t end, std::int64_t n_columns,
                                  std::int64_t most_columns) {
  std::vector<Rectangle> found;
  const auto add = [&](std::int64_t first, std::int64_t last, std::int64_t from, std::int64_t to) {
    for (std::int64_t row = first; row < last; row += kLowRankRows)
      for (std::int64_t column = from; column < to; column += most_columns)
        found.push_back(
            {row, std::min(row + kLowRankRows, last), column, std::min(column + most_columns, to)});
  };
  std::int64_t row = begin / n_columns;
  if (begin % n_columns != 0) {
    const std::int64_t stop = std::min(end, (row + 1) * n_columns);
    add(row, row + 1, begin % n_columns, stop - row * n_columns);
    begin = stop;
    ++row;
  }
  add(row, end / n_columns, 0, n_columns);
  if (begin < end && end % n_columns != 0)
    add(end / n_columns, end / n_columns + 1, 0, end % n_columns);
  return found;
}

}  // namespace

void add_low_rank(const LowRankSum& sum, std::int64_t begin, std::int64_t end,
                  const Options& options) {
  if (begin >= end) return;
  const Kernels& kernels = kernels_for(options.isa);
  const std::vector<Rectangle> tiles =
      rectangles(begin, end, sum.n_columns, low_rank_columns(sum.rank));
  const std::int64_t n_tiles = static_cast<std::int64_t>(tiles.size());
  const int n_threads = parallel_threads(n_tiles, options.n_threads);
  std::vector<Scratch> scratch(n_threads);
  parallel_for(n_tiles, n_threads, [&](std::int64_t task, int thread) {
    const Rectangle& one = tiles[task];
    kernels.add_low_rank(
        {sum, one.row_begin, one.row_end, one.column_begin, one.column_end, scratch[thread]});
  });
}

}  // namespace tvfast
