// BinnedSum against the definition in docs/numerics.md, and its independence of order.
#include "core/accumulate.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.hpp"

namespace {

using tvfast::BinnedSum;

BinnedSum sum_of(const std::vector<double>& values) {
  BinnedSum sum;
  for (double x : values) sum.add(x);
  return sum;
}

// Every addend at a multiple of 2^(40(J-1)), added as integers.
double by_definition(const std::vector<double>& values) {
  double largest = 0.0;
  for (double x : values) largest = std::max(largest, std::fabs(x));
  if (largest == 0.0) return 0.0;
  const int e = std::ilogb(largest);
  const int grid = 40 * (static_cast<int>(std::floor((e + 1) / 40.0)) - 1);
  tvfast::Int128 total = 0;
  for (double x : values) {
    // nearbyint would lose bits above 2^53: split the addend first.
    const double high = std::nearbyint(std::ldexp(x, -grid - 40));
    total += static_cast<tvfast::Int128>(high) * (tvfast::Int128{1} << 40);
    total += static_cast<tvfast::Int128>(
        std::nearbyint(std::ldexp(x - std::ldexp(high, grid + 40), -grid)));
  }
  return std::ldexp(static_cast<double>(total), grid);
}

}  // namespace

int main() {
  return run([] {
    std::mt19937_64 random(7);
    std::uniform_int_distribution<int> exponent(-140, 120);
    std::normal_distribution<double> normal;
    for (int round = 0; round < 2000; ++round) {
      std::vector<double> values;
      const int spread = round % 5 == 0 ? 200 : round % 41;
      const int center = exponent(random) / 2;
      for (int i = 0; i < 1 + round % 60; ++i)
        values.push_back(
            std::ldexp(normal(random),
                       center + (spread ? static_cast<int>(random() % spread) - spread / 2 : 0)));
      const double expected = by_definition(values);
      CHECK(sum_of(values).value() == expected);
      std::shuffle(values.begin(), values.end(), random);
      CHECK(sum_of(values).value() == expected);
      // Any split into parts, added in any order.
      const std::size_t cut = random() % (values.size() + 1);
      BinnedSum second = sum_of({values.begin() + cut, values.end()});
      second.add(sum_of({values.begin(), values.begin() + cut}));
      CHECK(second.value() == expected);
    }
    CHECK(sum_of({}).value() == 0.0);
    CHECK(sum_of({0.0, -0.0}).value() == 0.0);
    CHECK(sum_of({1.0, INFINITY}).value() == INFINITY);
    CHECK(std::isnan(sum_of({INFINITY, 1.0, -INFINITY}).value()));
    // Half a grid unit of the window above rounds to zero there: the neighbours of a window's edge.
    CHECK(tvfast::window_of(0x1p38) == 0 && tvfast::window_of(0x1p39) == 1 &&
          tvfast::window_of(0x1p-1) == 0);
    CHECK(tvfast::window_of(0x1p-2) == -1 && tvfast::window_of(0x1p-41) == -1 &&
          tvfast::window_of(0x1p-42) == -2);
  });
}
