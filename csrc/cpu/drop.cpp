// Draws by the magnitudes of one tensor, on several threads.
#include <algorithm>
#include <vector>

#include "api.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace tvfast {

namespace {

constexpr std::int64_t kElements = 1 << 16;               // of a task
constexpr std::int64_t kCounted = std::int64_t{1} << 31;  // that 32 bits count

std::int64_t tasks_of(std::int64_t n) { return (n + kElements - 1) / kElements; }

}  // namespace

void magnitude_counts(const View& values, std::int64_t n, std::int64_t* total,
                      const Options& options) {
  const Kernels& kernels = kernels_for(options.isa);
  std::fill_n(total, kMagnitudeBins, std::int64_t{0});
  const int n_threads = parallel_threads(tasks_of(n), options.n_threads);
  for (std::int64_t first = 0; first < n; first += kCounted) {
    const std::int64_t here = std::min(kCounted, n - first);
    std::vector<std::vector<std::uint32_t>> counts(n_threads,
                                                   std::vector<std::uint32_t>(kMagnitudeBins));
    parallel_for(tasks_of(here), n_threads, [&](std::int64_t task, int thread) {
      const std::int64_t begin = task * kElements;
      kernels.count_magnitudes(values, first + begin, std::min(kElements, here - begin),
                               counts[thread].data());
    });
    for (const auto& of_thread : counts)
      for (std::uint32_t bin = 0; bin < kMagnitudeBins; ++bin) total[bin] += of_thread[bin];
  }
}

void drop_binned(const BinnedDrop& drop, std::int64_t n, const Options& options) {
  const Kernels& kernels = kernels_for(options.isa);
  const int n_threads = parallel_threads(tasks_of(n), options.n_threads);
  std::vector<Scratch> scratch(n_threads);
  parallel_for(tasks_of(n), n_threads, [&](std::int64_t task, int thread) {
    const std::int64_t begin = task * kElements;
    kernels.drop_binned(drop, begin, std::min(kElements, n - begin), scratch[thread]);
  });
}

}  // namespace tvfast
