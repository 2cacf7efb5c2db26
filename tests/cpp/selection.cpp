// Thresholds against sorting, on data that misleads the sample as well, and verify and nth_equal
// against counting.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "check.hpp"
#include "cpu/api.hpp"

namespace {

using namespace tvfast;

Table table_of(const std::vector<std::vector<float>>& parts) {
  Table table;
  table.n_models = 1;
  std::int64_t before = 0;
  for (const auto& part : parts) {
    Entry entry;
    entry.models = {{part.data(), DType::F32}};
    entry.n = static_cast<std::int64_t>(part.size());
    entry.group_offset = before;
    before += entry.n;
    table.entries.push_back(entry);
  }
  return table;
}

void compare(const std::vector<std::vector<float>>& parts, std::mt19937_64& random) {
  std::vector<std::uint32_t> keys;
  for (const auto& part : parts)
    for (float x : part)
      keys.push_back(std::min(std::bit_cast<std::uint32_t>(x) & 0x7fffffffu, kNanKey));
  std::vector<std::uint32_t> sorted = keys;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const std::int64_t n = static_cast<std::int64_t>(keys.size());
  const Table table = table_of(parts);
  for (int n_threads : {1, 2}) {
    const Options options{"", n_threads, n_threads == 1 ? 0 : 4096};
    const std::vector<RankQuery> queries = {{0, 0, 1},
                                            {0, 0, n},
                                            {0, 0, n / 5 + 1},
                                            {0, 0, static_cast<std::int64_t>(random() % n) + 1}};
    const std::vector<Threshold> found = thresholds(table, Keep::BAND, queries, options);
    for (std::size_t q = 0; q < queries.size(); ++q) {
      const std::uint32_t key = sorted[queries[q].k - 1];
      const auto [first, last] =
          std::equal_range(sorted.begin(), sorted.end(), key, std::greater<>());
      CHECK(found[q].key == key);
      CHECK(found[q].n_greater == first - sorted.begin());
      CHECK(found[q].n_equal == last - first);
      const Threshold counted = verify(table, {{0, 0, key}}, options)[0];
      CHECK(counted.n_greater == found[q].n_greater && counted.n_equal == found[q].n_equal);
      const std::int64_t r = static_cast<std::int64_t>(random() % found[q].n_equal);
      const std::int64_t position = nth_equal(table, Keep::BAND, {{0, 0, key, r}}, options)[0];
      CHECK(position >= 0 && keys[position] == key);
      CHECK(std::count(keys.begin(), keys.begin() + std::max<std::int64_t>(position, 0), key) == r);
    }
    CHECK(nth_equal(table, Keep::BAND, {{0, 0, sorted[0], n}}, options)[0] == -1);
  }
}

}  // namespace

int main() {
  return run([] {
    std::mt19937_64 random(3);
    std::normal_distribution<float> normal;
    std::vector<std::vector<float>> parts(3);
    for (std::size_t n : {1, 63, 64, 1000, 16384, 16385, 70001, 300000}) {
      const auto fill = [&](const std::function<float(std::size_t)>& value) {
        parts[0].resize(n / 3);
        parts[1].resize(n / 2 - n / 3);
        parts[2].resize(n - n / 2);
        std::size_t i = 0;
        for (auto& part : parts)
          for (float& x : part) x = value(i++);
        compare(parts, random);
      };
      fill([&](std::size_t) { return normal(random); });
      fill([&](std::size_t) { return std::round(normal(random) * 3) / 8; });  // many ties and zeros
      fill([&](std::size_t) { return 0.5f; });
      fill([&](std::size_t i) {
        return i % 97 == 0 ? NAN : i % 89 == 0 ? -INFINITY : normal(random);
      });
      fill([&](std::size_t i) { return std::ldexp(1.0f, static_cast<int>(i % 250) - 140); });
      // One run far larger than the rest, shorter than a stratum of the sample: the bracket misses.
      fill([&](std::size_t i) {
        return i * 1000 / n == 500 ? 100.0f + normal(random) : 1e-3f * normal(random);
      });
      // Values so close together that the bracket overflows with candidates of many distinct keys.
      fill([&](std::size_t) {
        return std::bit_cast<float>(0x3f800000u + static_cast<std::uint32_t>(random() % 64));
      });
    }
  });
}
