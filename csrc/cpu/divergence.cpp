// Divergences of the rows of matrices, and what is taken over, on several threads.
#include <algorithm>
#include <vector>

#include "api.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace tvfast {

namespace {

constexpr std::int64_t kElements = 1 << 15;  // of a task, about

}  // namespace

void divergences(const Divergence& matrix, const Options& options) {
  const Kernels& kernels = kernels_for(options.isa);
  const std::int64_t rows_of_task =
      std::max<std::int64_t>(1, kElements / std::max<std::int64_t>(1, matrix.length));
  const std::int64_t n_tasks = (matrix.n_rows + rows_of_task - 1) / rows_of_task;
  const int n_threads = parallel_threads(n_tasks, options.n_threads);
  std::vector<Scratch> scratch(n_threads);
  parallel_for(n_tasks, n_threads, [&](std::int64_t task, int thread) {
    const std::int64_t end = std::min(matrix.n_rows, (task + 1) * rows_of_task);
    for (std::int64_t row = task * rows_of_task; row < end; ++row)
      kernels.divergence_of_row(matrix, row, scratch[thread]);
  });
}

void fuse(const Fusion& fusion, std::int64_t n, const Options& options) {
  const Kernels& kernels = kernels_for(options.isa);
  const std::int64_t n_tasks = (n + kElements - 1) / kElements;
  const int n_threads = parallel_threads(n_tasks, options.n_threads);
  std::vector<Scratch> scratch(n_threads);
  parallel_for(n_tasks, n_threads, [&](std::int64_t task, int thread) {
    const std::int64_t begin = task * kElements;
    kernels.fuse_run(fusion, begin, std::min(kElements, n - begin), scratch[thread]);
  });
}

}  // namespace tvfast
