#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace tvfast {

namespace {

// Default floating-point behaviour for a scope: round to nearest, subnormals kept. A caller may
// have changed its thread's, as torch.set_flush_denormal does, and new threads inherit that.
class DefaultFloat {
 public:
#if defined(__x86_64__)
  DefaultFloat() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloat() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloat() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
  }
  ~DefaultFloat() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  std::uint64_t saved_;
#endif
};

// Non-temporal stores are weakly ordered: they must be visible before the caller reads the result.
void finish_streaming_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace

int available_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

int parallel_threads(std::int64_t n_tasks, int n_threads) {
  const int wanted = n_threads > 0 ? n_threads : available_threads();
  return static_cast<int>(std::clamp<std::int64_t>(n_tasks, 1, wanted));
}

void parallel_for(std::int64_t n_tasks, int n_threads,
                  const std::function<void(std::int64_t, int)>& fn) {
  n_threads = parallel_threads(n_tasks, n_threads);
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_lock;
  const auto work = [&](int thread) {
    [[maybe_unused]] const DefaultFloat floating;
    try {
      for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;)
        fn(task, thread);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(error_lock);
      if (!error) error = std::current_exception();
      next.store(n_tasks, std::memory_order_relaxed);
    }
    finish_streaming_stores();
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(n_threads - 1));
  try {
    for (int thread = 1; thread < n_threads; ++thread) threads.emplace_back(work, thread);
  } catch (const std::system_error&) {
    // The process may start no more threads: those that run share the tasks.
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace tvfast
