// Every task runs once, whatever the number of threads, and an exception reaches the caller.
#include "cpu/parallel.hpp"

#include <atomic>
#include <stdexcept>
#include <vector>

#include "check.hpp"

int main() {
  return run([] {
    for (int n_threads : {0, 1, 2, 7}) {
      for (std::int64_t n_tasks : {0, 1, 5, 1000}) {
        std::vector<std::atomic<int>> runs(n_tasks);
        const int most = tvfast::parallel_threads(n_tasks, n_threads);
        tvfast::parallel_for(n_tasks, n_threads, [&](std::int64_t task, int thread) {
          CHECK(thread >= 0 && thread < most);
          ++runs[task];
        });
        for (const auto& count : runs) CHECK(count == 1);
      }
      bool caught = false;
      try {
        tvfast::parallel_for(100, n_threads, [](std::int64_t task, int) {
          if (task == 50) throw std::runtime_error("task 50");
        });
      } catch (const std::runtime_error&) {
        caught = true;
      }
      CHECK(caught);
    }
    CHECK(tvfast::available_threads() >= 1);
  });
}
