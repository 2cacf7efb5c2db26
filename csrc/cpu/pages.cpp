// Pages of files in the place of memory: what the page cache holds is shown there, not copied.
#include "api.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <mutex>
#endif

#include <cstdint>
#include <stdexcept>

namespace tvfast {

#if defined(__linux__)

namespace {

// Linux 6.5; the same number on every architecture.
constexpr long kCachestat = 451;
struct CachestatRange {
  std::uint64_t offset, n_bytes;
};
struct Cachestat {
  std::uint64_t n_cached, n_dirty, n_writeback, n_evicted, n_recently_evicted;
};

constexpr int kReadWrite = PROT_READ | PROT_WRITE;

std::size_t page_size() {
  static const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

bool is_cached(int descriptor, std::int64_t offset, std::size_t n_bytes) {
  CachestatRange range{static_cast<std::uint64_t>(offset), n_bytes};
  Cachestat found{};
  return syscall(kCachestat, descriptor, &range, &found, 0) == 0 &&
         found.n_cached * page_size() >= n_bytes;
}

// A range of memory in which files may stand. `begin` is 0 where nobody uses it.
struct Guard {
  std::atomic<std::uintptr_t> begin{0}, end{0};
  std::atomic<bool> lost{false};
};

constexpr int kGuards = 1024;
Guard guards[kGuards];
std::mutex guarding;
struct sigaction previous;

// A page of a file that was shortened, or that the system could not read again, becomes zeros, and
// its range is lost. Any other such signal goes to whoever had it before.
void on_bus_error(int signal_number, siginfo_t* info, void* context) {
  const int saved = errno;
  const auto at = reinterpret_cast<std::uintptr_t>(info->si_addr);
  for (Guard& guard : guards) {
    const std::uintptr_t begin = guard.begin.load(std::memory_order_acquire);
    if (begin == 0 || at < begin || at >= guard.end.load(std::memory_order_relaxed)) continue;
    void* page = reinterpret_cast<void*>(at - at % page_size());
    guard.lost.store(true, std::memory_order_release);  // before another thread can see zeros
    if (mmap(page, page_size(), kReadWrite, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
        MAP_FAILED)
      break;
    errno = saved;
    return;
  }
  errno = saved;
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal_number, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
    return previous.sa_handler(signal_number);
  std::signal(signal_number, SIG_DFL);
  raise(signal_number);
}

bool listen_to_bus_errors() {
  page_size();
  struct sigaction action{};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  return sigaction(SIGBUS, &action, &previous) == 0;
}

}  // namespace

int guard_pages(void* at, std::size_t n_bytes) {
  static const bool listening = listen_to_bus_errors();
  if (!listening) return -1;
  const std::lock_guard<std::mutex> lock(guarding);
  for (int k = 0; k < kGuards; ++k) {
    Guard& guard = guards[k];
    if (guard.begin.load(std::memory_order_relaxed) != 0) continue;
    guard.lost.store(false, std::memory_order_relaxed);
    guard.end.store(reinterpret_cast<std::uintptr_t>(at) + n_bytes, std::memory_order_relaxed);
    guard.begin.store(reinterpret_cast<std::uintptr_t>(at), std::memory_order_release);
    return k;
  }
  return -1;
}

bool lost_pages(int guard) { return guards[guard].lost.load(std::memory_order_acquire); }

void end_guard(int guard) { guards[guard].begin.store(0, std::memory_order_release); }

bool show_pages(void* at, std::size_t n_bytes, int descriptor, std::int64_t offset) {
  if (!is_cached(descriptor, offset, n_bytes)) return false;
  // Private and writable: who makes numbers in place gets copies of those pages.
  if (mmap(at, n_bytes, kReadWrite, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, descriptor, offset) !=
          MAP_FAILED &&
      madvise(at, n_bytes, MADV_POPULATE_READ) == 0)
    return true;
  hide_pages(at, n_bytes);
  return false;
}

void hide_pages(void* at, std::size_t n_bytes) {
  if (mmap(at, n_bytes, kReadWrite, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
    throw std::runtime_error("the system has no room for the pages of a merge");
  madvise(at, n_bytes, MADV_HUGEPAGE);
}

#else

int guard_pages(void*, std::size_t) { return -1; }
bool lost_pages(int) { return false; }
void end_guard(int) {}
bool show_pages(void*, std::size_t, int, std::int64_t) { return false; }
void hide_pages(void*, std::size_t) {}

#endif

}  // namespace tvfast
