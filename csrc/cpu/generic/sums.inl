// Order-independent sums of a block: docs/numerics.md, "Sums". No include guard on purpose.

TVFAST_INLINE D widened_magnitude(const float* p) {
  return (D)((Q)widened(p) & 0x7fffffffffffffffull);
}

// Adds `n` doubles to an order-independent sum: docs/numerics.md, "Sums". value(j) is kDoubles of
// them from j on, zeros past `n`. Parts of addends are below 2^39 units, so sums of up to 2^14 of
// them are exact.
template <class Value>
TVFAST_INLINE void add_block(BinnedSum& sum, std::int64_t n, Value&& value) {
  constexpr int kParts = kLanes / kDoubles;
  // At the window of the largest addend so far, two rounding constants split an addend into exact
  // high and low parts. If the block holds a larger addend, the window is raised and the block is
  // taken again.
  for (int window = sum.window == kNoWindow ? -9 : sum.window;;) {
    const double split_high = std::ldexp(1.5, 52 + kWindowBits * window);
    const double split_low = std::ldexp(1.5, 52 + kWindowBits * (window - 1));
    D high[kParts] = {}, low[kParts] = {};
    Q most[kParts] = {};
    for (std::int64_t j = 0; j < n; j += kLanes) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        const D x = value(j + part * kDoubles);
        const D q = (x + split_high) - split_high;
        high[part] += q;
        low[part] += ((x - q) + split_low) - split_low;
        const Q magnitude = (Q)x & 0x7fffffffffffffffull;
        most[part] = magnitude > most[part] ? magnitude : most[part];
      }
    }
    std::uint64_t largest = 0;
    for (const Q& part : most) largest = std::max<std::uint64_t>(largest, lane_max(part));
    if (largest >= 0x7ff0000000000000ull) {
      for (std::int64_t j = 0; j < n; j += kDoubles) {
        const D x = value(j);
        for (int lane = 0; lane < kDoubles; ++lane) sum.add(x[lane]);
      }
      return;
    }
    if (largest == 0) return;
    const int needed = window_of(std::bit_cast<double>(largest));
    if (needed > window || sum.window == kNoWindow) {
      sum.raise(needed);
      if (needed != window) {
        window = needed;
        continue;
      }
    }
    for (int part = 0; part < kParts; ++part) {
      sum.high += static_cast<Int128>(std::ldexp(lane_sum(high[part]), -kWindowBits * window));
      sum.low += static_cast<Int128>(std::ldexp(lane_sum(low[part]), -kWindowBits * (window - 1)));
    }
    return;
  }
}

// A split of addends at a window: adding and subtracting a constant rounds to a multiple of its
// last bit.
struct Split {
  double high, low;
};

TVFAST_INLINE double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<std::uint64_t>(1023 + exponent) << 52);
}

TVFAST_INLINE Split split_at(int window) {
  return {1.5 * power_of_two(52 + kWindowBits * window),
          1.5 * power_of_two(52 + kWindowBits * (window - 1))};
}

// The largest magnitudes of lanes, as bits; NaN is above all.
TVFAST_INLINE U largest_lanes(U most, F x) {
  const U own = bits(magnitude(x));
  return own > most ? own : most;
}

// The largest magnitude of a block.
TVFAST_INLINE float largest_of(const float* x, std::int64_t n) {
  U most = {};
  for (std::int64_t j = 0; j < n; j += kLanes) most = largest_lanes(most, load<F>(x + j));
  return std::bit_cast<float>(lane_max(most));
}

// A block, and what its products with another one are added to. Zeros follow what a block holds, up
// to a whole vector.
struct Factor {
  const float* y;
  BinnedSum* sum;
};

// Adds the products of x with `count` blocks, none of which raises the window of its sum; `own`:
// the first of them is x. A product of two floats is exact, so that nothing has to be split before
// it is added to a constant. The bits of that constant and the multiple that was added to it are
// one integer, and so are sums of those.
template <int count, bool own>
static void add_products_within(const float* x, const Factor* factors, std::int64_t n) {
  D split_high[count], split_low[count];
  Q high[count] = {}, low[count] = {};
  for (int p = 0; p < count; ++p) {
    const Split split = split_at(factors[p].sum->window);
    split_high[p] = D{} + split.high;
    split_low[p] = D{} + split.low;
  }
  std::int64_t n_addends = 0;
  for (; n_addends < n; n_addends += kDoubles) {
    const D first = widened(x + n_addends);
#pragma GCC unroll 4
    for (int p = 0; p < count; ++p) {
      const D second = own && p == 0 ? first : widened(factors[p].y + n_addends);
      const D rounded = add_product(first, second, split_high[p]);
      const D rest = add_product(first, second, split_high[p] - rounded);
      high[p] += (Q)rounded;
      low[p] += (Q)(rest + split_low[p]);
    }
  }
  for (int p = 0; p < count; ++p) {
    const auto total = [&](Q sum, double split) {
      return static_cast<std::int64_t>(lane_sum(sum) - static_cast<std::uint64_t>(n_addends) *
                                                           std::bit_cast<std::uint64_t>(split));
    };
    factors[p].sum->high += total(high[p], split_high[p][0]);
    factors[p].sum->low += total(low[p], split_low[p][0]);
  }
}

// Sums that are kept in registers together.
inline constexpr int kProducts = kLanes > 8 ? 4 : 2;

// Adds the products of a block with others, several at a time.
class Products {
 public:
  // `largest`: a magnitude that no entry exceeds.
  Products(const float* x, float largest, std::int64_t n) : x_(x), largest_(largest), n_(n) {}

  void add(const float* y, float largest, BinnedSum& sum) {
    const double most = static_cast<double>(largest_) * static_cast<double>(largest);
    if (most == 0.0) return;
    if (sum.window == kNoWindow || !(most < power_of_two(kWindowBits * (sum.window + 1) - 1))) {
      add_block(sum, n_, [this, y](std::int64_t j) { return widened(x_ + j) * widened(y + j); });
      return;
    }
    factors_[n_factors_++] = {y, &sum};
    if (n_factors_ == kProducts) flush();
  }

  void flush() { flush_some<kProducts>(); }

 private:
  template <int count>
  void flush_some() {
    if constexpr (count > 0) {
      if (n_factors_ < count) return flush_some<count - 1>();
      if (factors_[0].y == x_) {
        add_products_within<count, true>(x_, factors_, n_);
      } else {
        add_products_within<count, false>(x_, factors_, n_);
      }
      n_factors_ = 0;
    }
  }

  const float* x_;
  float largest_;
  std::int64_t n_;
  Factor factors_[kProducts];
  int n_factors_ = 0;
};
