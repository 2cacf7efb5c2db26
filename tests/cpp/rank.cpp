// Ranks of a row against a stable sort: rows that are counted, rows that are sorted, and those in
// between; and the memory that they take.
#include <malloc.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "cpu/isa.hpp"

namespace {

// Bytes of memory on boundaries, as scratch is.
std::size_t n_held = 0, most_held = 0;

}  // namespace

void* operator new(std::size_t n_bytes, std::align_val_t boundary) {
  const std::size_t step = static_cast<std::size_t>(boundary);
  void* p = std::aligned_alloc(step, (n_bytes + step - 1) / step * step);
  if (p == nullptr) throw std::bad_alloc();
  n_held += malloc_usable_size(p);
  most_held = std::max(most_held, n_held);
  return p;
}

void operator delete(void* p, std::align_val_t) noexcept {
  n_held -= malloc_usable_size(p);
  std::free(p);
}

void operator delete(void* p, std::size_t, std::align_val_t boundary) noexcept {
  operator delete(p, boundary);
}

namespace {

using namespace tvfast;

std::uint32_t key_of(float x) {
  return std::isnan(x) ? kNanKey : std::bit_cast<std::uint32_t>(x) & 0x7fffffffu;
}

void compare(const std::vector<float>& row, Scratch& scratch) {
  const std::int64_t n = std::ssize(row);
  std::vector<std::uint32_t> order(n), expected(n), found(n + 64);
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return key_of(row[a]) < key_of(row[b]);
  });
  for (std::int64_t i = 0; i < n; ++i) expected[order[i]] = static_cast<std::uint32_t>(i);
  std::vector<float> padded = row;
  padded.resize(n + 64, std::numeric_limits<float>::infinity());  // which must not be ranked
  kernels_for("").rank_row(padded.data(), n, scratch, found.data());
  CHECK(std::equal(expected.begin(), expected.end(), found.begin()));
}

float rounded_to_bfloat16(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  return std::bit_cast<float>((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}

float of_bits(std::uint32_t bits) { return std::bit_cast<float>(bits); }

// One bin holds almost every key, and is sorted: 20 bytes a key beside the row and its ranks, as
// docs/methods.md has it, and at most 256 KiB of counters.
void compare_memory() {
  const std::int64_t n = 1 << 17;
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> row(n + 64);
  for (std::int64_t i = 0; i < n; ++i) row[i] = normal(random);
  row[n / 2] = 1e30f;
  std::vector<std::uint32_t> ranks(n + 64);
  Scratch scratch;
  const std::size_t before = n_held;
  most_held = before;
  kernels_for("").rank_row(row.data(), n, scratch, ranks.data());
  CHECK(ranks[n / 2] == n - 1);
  CHECK(most_held - before <= 20 * n + (std::size_t{384} << 10));
}

}  // namespace

int main() {
  return run([] {
    compare_memory();
    std::mt19937_64 random(5);
    std::normal_distribution<float> normal;
    Scratch scratch;  // shared, so that what a row leaves there must not matter to the next
    for (std::size_t n :
         {1, 2, 3, 17, 63, 64, 65, 255, 256, 257, 1000, 1024, 2047, 2048, 5003, 70001}) {
      const auto fill = [&](const std::function<float(std::size_t)>& value) {
        std::vector<float> row(n);
        for (std::size_t i = 0; i < n; ++i) row[i] = value(i);
        compare(row, scratch);
      };
      // Fine-tunes of several step sizes: many, few and hardly any of the keys are long.
      for (float step : {1e-2f, 1e-3f, 1e-4f, 1e-5f})
        fill([&](std::size_t) {
          const float base = rounded_to_bfloat16(0.02f * normal(random));
          return rounded_to_bfloat16(base + step * normal(random)) - base;
        });
      fill([&](std::size_t) { return normal(random); });
      fill([&](std::size_t) { return rounded_to_bfloat16(normal(random)); });
      fill([&](std::size_t) { return rounded_to_bfloat16(std::exp(20.0f * normal(random))); });
      fill([&](std::size_t) { return random() % 2 ? 0.0f : -0.0f; });
      fill([&](std::size_t) { return 0.5f; });
      fill([&](std::size_t i) { return static_cast<float>(i); });
      fill([&](std::size_t i) { return -static_cast<float>(n - i); });
      // One key in `share` is long, of a few values each: about as many as may be.
      for (std::uint32_t share : {7u, 8u, 9u, 100u})
        fill([&](std::size_t i) {
          const std::uint32_t low = i % share == 0 ? 1u + random() % 3 : 0u;
          return of_bits(0x3c000000u + (static_cast<std::uint32_t>(random() % 40) << 16) + low);
        });
      // Most of the keys far below the largest, subnormals, and every kind of NaN.
      fill([&](std::size_t i) { return i == n / 2 ? 1e30f : rounded_to_bfloat16(normal(random)); });
      fill([&](std::size_t) { return of_bits(static_cast<std::uint32_t>(random() % 4) << 15); });
      fill([&](std::size_t) { return of_bits(static_cast<std::uint32_t>(random() % 5)); });
      fill([&](std::size_t) { return of_bits(0x7f7e0000u + (random() % 6 << 16)); });
      fill([&](std::size_t) {
        return of_bits(
            static_cast<std::uint32_t>(random() % 2 << 31 | (0x7f7fffffu + random() % 5)));
      });
      fill([&](std::size_t) { return of_bits(static_cast<std::uint32_t>(random())); });
    }
  });
}
