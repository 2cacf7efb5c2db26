// Selection over parts against selection over everything: any cuts, samples that mislead, few
// passes, and memory that does not grow with the data.
#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <new>
#include <random>
#include <vector>

#include "check.hpp"
#include "cpu/api.hpp"

namespace {

std::atomic<std::size_t> live_bytes{0}, peak_bytes{0};

void* counted(void* p) {
  if (p == nullptr) throw std::bad_alloc();
  const std::size_t now = live_bytes += malloc_usable_size(p);
  if (now > peak_bytes) peak_bytes = now;
  return p;
}

void release(void* p) {
  if (p != nullptr) live_bytes -= malloc_usable_size(p);
  std::free(p);
}

}  // namespace

void* operator new(std::size_t n) { return counted(std::malloc(n)); }
void* operator new(std::size_t n, std::align_val_t alignment) {
  const std::size_t a = static_cast<std::size_t>(alignment);
  return counted(std::aligned_alloc(a, (n + a - 1) / a * a));
}
void operator delete(void* p) noexcept { release(p); }
void operator delete(void* p, std::size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { release(p); }

namespace {

using namespace tvfast;

constexpr int kModels = 2;

// Two groups of two models each, with a base.
struct Data {
  std::vector<float> base[2], models[2][kModels];

  Table part(int group, std::size_t begin, std::size_t end) const {
    Table table;
    table.n_models = kModels;
    Entry entry;
    entry.base = {base[group].data() + begin, DType::F32};
    for (const auto& model : models[group])
      entry.models.push_back({model.data() + begin, DType::F32});
    entry.n = static_cast<std::int64_t>(end - begin);
    entry.offset = static_cast<std::int64_t>(begin);
    entry.group = group;
    table.entries.push_back(entry);
    return table;
  }

  Table whole() const {
    Table table = part(0, 0, base[0].size());
    table.entries.push_back(part(1, 0, base[1].size()).entries[0]);
    return table;
  }
};

enum class Sampled { NOTHING, EVERY_TENTH, START, EVERYTHING };

// Answers equal those of one table; returns how many passes they took.
int compare(const Data& data, Keep keep, Sampled sampled, std::mt19937_64& random) {
  std::vector<Table> parts;
  for (int group = 0; group < 2; ++group)
    for (std::size_t begin = 0, n = data.base[group].size(); begin < n;) {
      const std::size_t end = std::min(n, begin + 1 + random() % (n / 3 + 1));
      parts.push_back(data.part(group, begin, end));
      begin = end;
    }
  std::shuffle(parts.begin(), parts.end(), random);
  std::vector<std::int64_t> sizes;
  std::vector<RankQuery> queries;
  for (int group = 0; group < 2; ++group) {
    const std::int64_t n = static_cast<std::int64_t>(data.base[group].size());
    sizes.push_back(n);
    for (int model = 0; model < (keep == Keep::VARIANCE ? 1 : kModels); ++model)
      for (std::int64_t k :
           {std::int64_t{1}, n / 5 + 1, n, static_cast<std::int64_t>(random() % n) + 1})
        queries.push_back({group, model, k});
  }
  const Options options{"", static_cast<int>(random() % 3) + 1, random() % 2 ? 0 : 4096};
  ResumableSelection selection(keep, queries, sizes);
  for (int group = 0; group < 2 && sampled != Sampled::NOTHING; ++group) {
    const std::size_t n = data.base[group].size();
    for (std::size_t i = 0; i < n; i += 64) {
      if (sampled == Sampled::EVERY_TENTH && i % 640 != 0) continue;
      if (sampled == Sampled::START && i > n / 16) break;
      selection.sample(data.part(group, i, std::min(n, i + 64)), options);
    }
  }
  const auto guesses = selection.guesses(options);
  int n_passes = 0;
  for (bool done = false; !done && n_passes < 9; done = selection.finish(), ++n_passes)
    for (const Table& part : parts) selection.count(part, options);
  const std::vector<Threshold> expected = thresholds(data.whole(), keep, queries, options);
  for (std::size_t q = 0; q < queries.size(); ++q) {
    const Threshold& found = selection.answers()[q];
    CHECK(found.key == expected[q].key);
    CHECK(found.n_greater == expected[q].n_greater);
    CHECK(found.n_equal == expected[q].n_equal);
    if (sampled == Sampled::EVERYTHING && guesses[q].likely) CHECK(guesses[q].key == found.key);
  }
  return n_passes;
}

void fill(Data& data, std::size_t n, const std::function<float(std::size_t)>& value) {
  for (int group = 0; group < 2; ++group) {
    const std::size_t size = group == 0 ? n : n / 7 + 1;
    data.base[group].resize(size);
    for (auto& model : data.models[group]) model.resize(size);
    for (std::size_t i = 0; i < size; ++i) {
      data.base[group][i] = 0.25f * static_cast<float>(i % 3);
      for (auto& model : data.models[group]) model[i] = data.base[group][i] + value(i);
    }
  }
}

void test_answers(std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  Data data;
  for (std::size_t n : {1, 17, 1000, 16385, 120000}) {
    const std::vector<std::function<float(std::size_t)>> contents = {
        [&](std::size_t) { return normal(random); },
        [&](std::size_t) { return std::round(normal(random) * 3) / 8; },  // many ties and zeros
        [&](std::size_t) { return 0.5f; },
        [&](std::size_t i) { return i % 97 == 0   ? NAN
                                    : i % 89 == 0 ? -INFINITY
                                                  : normal(random); },
        [&](std::size_t i) { return std::ldexp(1.0f, static_cast<int>(i % 250) - 140); },
        // What the first sixteenth holds says nothing of the rest, and what every tenth line holds
        // neither.
        [&](std::size_t i) {
          return i * 16 / n == 0 ? 1e-3f * normal(random) : 3.0f + normal(random);
        },
        [&](std::size_t i) { return i % 640 < 64 ? 100.0f + normal(random) : normal(random); },
        // Stretches of different scale: the sample is less sure than its size suggests.
        [&](std::size_t i) {
          return normal(random) * static_cast<float>(1 + i / 5000 * 7919 % 13);
        },
    };
    for (std::size_t c = 0; c < contents.size(); ++c) {
      fill(data, n, contents[c]);
      CHECK(compare(data, Keep::BAND, Sampled::EVERYTHING, random) == 1);
      CHECK(compare(data, Keep::BAND, Sampled::NOTHING, random) <= 3);
      CHECK(compare(data, Keep::BAND, Sampled::START, random) <= 5);
      const int n_passes = compare(data, Keep::BAND, Sampled::EVERY_TENTH, random);
      CHECK(n_passes <= (n < 100000 || c == 5 || c == 6 ? 5 : c == 7 ? 2 : 1));
    }
    fill(data, n, contents[0]);
    CHECK(compare(data, Keep::VARIANCE, Sampled::EVERYTHING, random) == 1);
  }
}

// One part shown again and again is as much data as one likes.
void test_memory(std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  const std::int64_t n = std::int64_t{1} << 18;
  Data data;
  fill(data, static_cast<std::size_t>(n), [&](std::size_t) { return normal(random); });
  const Table part = data.part(0, 0, static_cast<std::size_t>(n));
  for (int n_times : {2, 128}) {
    const std::size_t before = live_bytes;
    peak_bytes = before;
    std::vector<RankQuery> queries;
    for (int model = 0; model < kModels; ++model)
      for (int q = 1; q < 4; ++q) queries.push_back({0, model, n_times * n / 4 * q});
    ResumableSelection selection(Keep::BAND, queries, {n_times * n});
    for (int i = 0; i < n_times; ++i) selection.sample(part, {"", 2, 0});
    do {
      for (int i = 0; i < n_times; ++i) selection.count(part, {"", 2, 0});
    } while (!selection.finish());
    const Threshold whole = thresholds(part, Keep::BAND, {{0, 0, n / 4}}, {})[0];
    CHECK(selection.answers()[0].key == whole.key);
    CHECK(selection.answers()[0].n_equal == n_times * whole.n_equal);
    CHECK(peak_bytes - before < std::size_t{64} << 20);
  }
}

void test_errors() {
  const auto fails = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  Data data;
  fill(data, 100, [](std::size_t i) { return static_cast<float>(i); });
  CHECK(fails([] { ResumableSelection(Keep::BAND, {{0, 0, 11}}, {10}); }));
  CHECK(fails([] { ResumableSelection(Keep::BAND, {{1, 0, 1}}, {10}); }));
  ResumableSelection selection(Keep::BAND, {{0, 0, 5}}, {100});
  selection.count(data.part(0, 0, 60), {});
  CHECK(fails([&] { selection.sample(data.part(0, 0, 60), {}); }));
  CHECK(fails([&] { selection.finish(); }));
  selection.count(data.part(0, 60, 100), {});
  while (!selection.finish()) selection.count(data.part(0, 0, 100), {});
  CHECK(selection.answers()[0].key == std::bit_cast<std::uint32_t>(95.0f));
}

}  // namespace

int main() {
  return run([] {
    std::mt19937_64 random(5);
    test_answers(random);
    test_memory(random);
    test_errors();
  });
}
