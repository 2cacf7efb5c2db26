// A sum of doubles that does not depend on order: docs/numerics.md, "Sums".
#pragma once

#include <cmath>
#include <cstdint>

namespace tvfast {

__extension__ typedef __int128 Int128;

inline constexpr int kWindowBits = 40;
inline constexpr int kNoWindow = -1000;

// Window of a positive finite double: below half a unit of the next window's grid, so that it
// rounds to zero there.
inline int window_of(double magnitude) {
  int exponent;
  std::frexp(magnitude,
             &exponent);  // magnitude = f * 2^exponent, 0.5 <= f < 1: 2^(exponent-1) <= magnitude
  return exponent >= 0 ? exponent / kWindowBits : -((-exponent + kWindowBits - 1) / kWindowBits);
}

// Addends rounded at multiples of 2^(40(window-1)), split into multiples of 2^(40 window) and the
// rest.
struct BinnedSum {
  int window = kNoWindow;
  Int128 high = 0;
  Int128 low = 0;
  double nonfinite = 0.0;  // sum of the non-finite addends

  // Makes `to` the window if it is above the present one. Addends of window - 1 round to their high
  // part there, those further below round to zero.
  void raise(int to) {
    if (to <= window) return;
    low = to == window + 1 ? high : Int128{0};
    high = 0;
    window = to;
  }

  void add(double x) {
    if (!std::isfinite(x)) {
      nonfinite += x;
      return;
    }
    if (x == 0.0) return;
    raise(window_of(std::fabs(x)));
    const double q = std::nearbyint(std::ldexp(x, -kWindowBits * window));
    const double rest = x - std::ldexp(q, kWindowBits * window);
    high += static_cast<Int128>(q);
    low += static_cast<Int128>(std::nearbyint(std::ldexp(rest, -kWindowBits * (window - 1))));
  }

  void add(const BinnedSum& other) {
    nonfinite += other.nonfinite;
    if (other.window == kNoWindow) return;
    BinnedSum aligned = other;
    raise(other.window);
    aligned.raise(window);
    high += aligned.high;
    low += aligned.low;
  }

  double value() const {
    if (nonfinite != 0.0 || std::isnan(nonfinite)) return nonfinite;
    if (window == kNoWindow) return 0.0;
    const Int128 total = high * (Int128{1} << kWindowBits) + low;
    return std::ldexp(static_cast<double>(total), kWindowBits * (window - 1));
  }
};

}  // namespace tvfast
