#include "simt.hpp"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace tvfast::gpu::simt {

thread_local Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr std::size_t kStackBytes = std::size_t{256} << 10;

enum class State { READY, AT_BARRIER, AT_EXCHANGE, DONE };

struct Fiber {
  ucontext_t context;
  State state = State::DONE;
  unsigned mask = 0;
  std::uint64_t word = 0;
};

struct Warp {
  std::uint64_t words[32];
};

class Block {
 public:
  explicit Block(int n_threads)
      : fibers_(n_threads), warps_((n_threads + 31) / 32), stacks_(n_threads) {
    for (auto& stack : stacks_)
      stack = std::make_unique_for_overwrite<unsigned char[]>(kStackBytes);
  }

  void run(const std::function<void()>& thread, const std::vector<int>& order);
  void wait(State state, unsigned mask, std::uint64_t word);
  const Warp& warp() const { return warps_[running_ / 32]; }

 private:
  static void enter();
  bool release_barrier();
  bool release_exchanges();

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<unsigned char[]>> stacks_;
  ucontext_t scheduler_;
  const std::function<void()>* thread_ = nullptr;
  int running_ = 0;
};

thread_local Block* current = nullptr;

void Block::enter() {
  (*current->thread_)();
  Fiber& self = current->fibers_[current->running_];
  self.state = State::DONE;
  swapcontext(&self.context, &current->scheduler_);
}

void Block::wait(State state, unsigned mask, std::uint64_t word) {
  const int self = running_;
  fibers_[self].state = state;
  fibers_[self].mask = mask;
  fibers_[self].word = word;
  swapcontext(&fibers_[self].context, &scheduler_);
}

// A barrier opens when every thread that has not returned waits at it.
bool Block::release_barrier() {
  bool any = false;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state == State::DONE) continue;
    if (fiber.state != State::AT_BARRIER) return false;
    any = true;
  }
  if (any)
    for (Fiber& fiber : fibers_)
      if (fiber.state == State::AT_BARRIER) fiber.state = State::READY;
  return any;
}

// An exchange takes place when all lanes of its mask have come to one with the same mask.
bool Block::release_exchanges() {
  bool any = false;
  for (std::size_t w = 0; w < warps_.size(); ++w) {
    const int first = static_cast<int>(32 * w);
    for (int lane = 0; lane < 32 && first + lane < std::ssize(fibers_); ++lane) {
      const Fiber& one = fibers_[first + lane];
      if (one.state != State::AT_EXCHANGE) continue;
      const unsigned mask = one.mask;
      bool complete = true;
      for (int other = 0; other < 32; ++other) {
        if ((mask >> other & 1u) == 0) continue;
        const int at = first + other;
        complete = complete && at < std::ssize(fibers_) &&
                   fibers_[at].state == State::AT_EXCHANGE && fibers_[at].mask == mask;
      }
      if (!complete) continue;
      for (int other = 0; other < 32; ++other) {
        if ((mask >> other & 1u) == 0) continue;
        warps_[w].words[other] = fibers_[first + other].word;
        fibers_[first + other].state = State::READY;
      }
      any = true;
      break;  // its lanes read the words before another exchange of this warp
    }
  }
  return any;
}

void Block::run(const std::function<void()>& thread, const std::vector<int>& order) {
  thread_ = &thread;
  for (std::size_t i = 0; i < fibers_.size(); ++i) {
    Fiber& fiber = fibers_[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks_[i].get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
    fiber.state = State::READY;
  }
  current = this;
  for (;;) {
    bool ran = false;
    for (const int i : order) {
      if (fibers_[i].state != State::READY) continue;
      running_ = i;
      thread_index.x = static_cast<unsigned>(i);
      swapcontext(&scheduler_, &fibers_[i].context);
      ran = true;
    }
    if (ran) continue;
    if (release_exchanges() || release_barrier()) continue;
    const bool done = std::all_of(fibers_.begin(), fibers_.end(),
                                  [](const Fiber& f) { return f.state == State::DONE; });
    if (done) break;
    std::fprintf(stderr, "tvfast: threads of block %u wait for each other\n", block_index.x);
    std::abort();
  }
  current = nullptr;
}

unsigned seed() {
  const char* text = std::getenv("TVFAST_SIMT_SEED");
  return text == nullptr ? 1u : static_cast<unsigned>(std::strtoul(text, nullptr, 10));
}

}  // namespace

void sync_block() { current->wait(State::AT_BARRIER, 0, 0); }

void exchange(unsigned mask, std::uint64_t word, std::uint64_t* words) {
  current->wait(State::AT_EXCHANGE, mask, word);
  std::copy_n(current->warp().words, 32, words);
}

void run(std::int64_t n_blocks, int n_threads, const std::function<void()>& thread) {
  block_size.x = static_cast<unsigned>(n_threads);
  grid_size.x = static_cast<unsigned>(n_blocks);
  std::mt19937 random(seed());
  std::vector<std::int64_t> blocks(n_blocks);
  std::iota(blocks.begin(), blocks.end(), std::int64_t{0});
  std::shuffle(blocks.begin(), blocks.end(), random);
  std::vector<int> order(n_threads);
  std::iota(order.begin(), order.end(), 0);
  static thread_local std::map<int, std::unique_ptr<Block>> of_size;
  std::unique_ptr<Block>& block = of_size[n_threads];
  if (block == nullptr) block = std::make_unique<Block>(n_threads);
  for (const std::int64_t b : blocks) {
    std::shuffle(order.begin(), order.end(), random);
    block_index.x = static_cast<unsigned>(b);
    block->run(thread, order);
  }
}

}  // namespace tvfast::gpu::simt
