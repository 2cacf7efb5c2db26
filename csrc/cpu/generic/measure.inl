// measure: sums, counts and keys of a block. No include guard on purpose.

// Adds `n` doubles given by value(j) to an order-independent sum: docs/numerics.md, "Sums".
template <class Value>
TVFAST_INLINE void add_block(BinnedSum& sum, std::int64_t n, Value&& value) {
  // At the window of the largest addend so far, two rounding constants split an addend into exact high and low parts.
  // If the block holds a larger addend, the window is raised and the block is taken again.
  for (int window = sum.window == kNoWindow ? -9 : sum.window;;) {
    const double split_high = std::ldexp(1.5, 52 + kWindowBits * window);
    const double split_low = std::ldexp(1.5, 52 + kWindowBits * (window - 1));
    D high = {}, low = {};
    Q most = {};
    for (std::int64_t j = 0; j < n; j += kLanes) {
      const D x = value(j);
      const D q = (x + split_high) - split_high;
      high += q;
      low += ((x - q) + split_low) - split_low;
      const Q magnitude = (Q)x & 0x7fffffffffffffffull;
      most = magnitude > most ? magnitude : most;
    }
    std::uint64_t largest = 0;
    for (int lane = 0; lane < kLanes; ++lane) largest = std::max<std::uint64_t>(largest, most[lane]);
    if (largest >= 0x7ff0000000000000ull) {
      for (std::int64_t j = 0; j < n; j += kLanes) {
        const D x = value(j);
        for (int lane = 0; lane < kLanes; ++lane) sum.add(x[lane]);
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
    sum.high += static_cast<Int128>(std::ldexp(lane_sum(high), -kWindowBits * window));
    sum.low += static_cast<Int128>(std::ldexp(lane_sum(low), -kWindowBits * (window - 1)));
    return;
  }
}

TVFAST_INLINE D widened(F x) { return __builtin_convertvector(x, D); }

// Counts lanes of `m`, of the first `n` elements only.
TVFAST_INLINE M first_lanes(std::int64_t j, std::int64_t n) {
  return (M)(iota() < static_cast<std::uint32_t>(std::min<std::int64_t>(n - j, kLanes)));
}

static void count_nonfinite(const View& view, std::int64_t begin, std::int64_t n, std::int64_t& total) {
  I count = {};
  for_each(view, begin, n, [&](std::int64_t, F x) {
    count -= (I)((bits(x) & 0x7f800000u) == 0x7f800000u);
  });
  total += lane_sum(count);
}

// Conflicts among the kept t_k, and the sum of elected signs before the zero rule. Rescales the block's taus.
static void count_votes(const BlockCall& block, const float* variance, Moments& moments) {
  const TileCall& call = block.tile;
  const Program& program = call.program;
  const int n_models = call.n_models();
  std::vector<const float*> taus;
  std::vector<float> weights;
  for (int k = 0; k < n_models; ++k) {
    taus.push_back(block.tau(k));
    weights.push_back(call.models[k].weight);
  }
  I conflicts = {};
  for (std::int64_t j = 0; j < block.n; j += kLanes) {
    M positive = {}, negative = {};
    for (const float* tau : taus) {
      positive |= load<F>(tau + j) > splat(0.0f);
      negative |= load<F>(tau + j) < splat(0.0f);
    }
    conflicts -= positive & negative;
  }
  moments.n_conflict += lane_sum(conflicts);
  if (program.vote == Vote::NONE) return;
  for (int k = 0; k < n_models; ++k) rescale_block(block, k, keep_block(block, k, variance));
  I signs = {};
  for (std::int64_t j = 0; j < block.n; j += kLanes)
    signs += __builtin_convertvector(sign_of(vote(program, taus.data(), weights.data(), n_models, j)), I);
  moments.elected += lane_sum(signs);
}

static void measure_tile(const TileCall& call, unsigned wants, Moments& moments) {
  const Entry& entry = call.entry;
  const int n_models = call.n_models();
  for_each_block(call, [&](const BlockCall& block) {
    const std::int64_t n = block.n;
    const float* base = stage_base(entry, block.begin, n, call.scratch);
    if (wants & COUNTS) {
      if (base != nullptr) count_nonfinite(entry.base, block.begin, n, moments.n_base_nonfinite);
      for (int k = 0; k < n_models; ++k) count_nonfinite(entry.models[k], block.begin, n, moments.n_nonfinite[k]);
    }
    stage_taus(block, base, [&](int k, float* tau) {
      // What lies past the end must not count.
      for (std::int64_t j = n; j < n + kLanes; ++j) tau[j] = 0.0f;
      if (wants & L1_BEFORE)
        add_block(moments.l1_before[k], n, [tau](std::int64_t j) { return widened(magnitude(load<F>(tau + j))); });
    });
    const float* variance = stage_variance(block);
    for (int k = 0; k < n_models; ++k) {
      float* tau = block.tau(k);
      const KeepBlock keep = keep_block(block, k, variance);
      I kept_count = {}, nonzero_count = {};
      for (std::int64_t j = 0; j < n; j += kLanes) {
        const F x = load<F>(tau + j);
        const M kept = keep(j, x) & first_lanes(j, n);
        const F t = masked(kept, x);
        store(tau + j, t);
        kept_count -= kept;
        nonzero_count -= not_zero(t);
      }
      if (wants & COUNTS) {
        moments.n_kept[k] += lane_sum(kept_count);
        moments.n_nonzero[k] += lane_sum(nonzero_count);
      }
      if (wants & L1) add_block(moments.l1[k], n, [tau](std::int64_t j) { return widened(magnitude(load<F>(tau + j))); });
    }
    if (wants & (GRAM | SQUARES)) {
      for (int a = 0; a < n_models; ++a) {
        for (int b = a; b < (wants & GRAM ? n_models : a + 1); ++b) {
          const float *x = block.tau(a), *y = block.tau(b);
          add_block(moments.gram[a * n_models + b], n,
                    [x, y](std::int64_t j) { return widened(load<F>(x + j)) * widened(load<F>(y + j)); });
        }
      }
    }
    if (wants & VOTES) count_votes(block, variance, moments);
  });
}

static void keys_block(const Entry& entry, Keep keep, int model, std::int64_t begin, std::int64_t n, Scratch& scratch,
                       std::uint32_t* out) {
  const auto put_key = [out](std::int64_t j, F x) __attribute__((always_inline)) { store(out + j, bits(magnitude(x))); };
  if (keep == Keep::SCORE) {
    for_each(entry.scores[model], begin, n, put_key);
    return;
  }
  const float* base = stage_base(entry, begin, n, scratch);
  if (keep != Keep::VARIANCE) {
    for_each_tau(entry.models[model], base, begin, n, put_key);
    return;
  }
  const int n_models = static_cast<int>(entry.models.size());
  const std::int64_t stride = kMaxBlock + 64;
  float* taus = scratch.taus.get(stride * n_models);
  std::vector<const float*> of_model;
  for (int k = 0; k < n_models; ++k) {
    float* tau = taus + k * stride;
    for_each_tau(entry.models[k], base, begin, n, [tau](std::int64_t j, F x) { store(tau + j, x); });
    of_model.push_back(tau);
  }
  float* variance = scratch.score.get(stride);
  variance_block(of_model.data(), n_models, n, variance);
  for (std::int64_t j = 0; j < n; j += kLanes) store(out + j, bits(magnitude(load<F>(variance + j))));
}

template <DType dtype>
static void verify_as(const Entry& entry, int model, std::int64_t begin, std::int64_t end, Bracket& bracket) {
  using S = Step<dtype>;
  const I value = (I)splat_bits(bracket.hi);
  I above = {}, from = {};
  const auto count = [&](F x, M valid) __attribute__((always_inline)) {
    const I key = (I)bits(magnitude(x));
    above -= (key > value) & valid;
    from -= (key >= value) & valid;
  };
  const void *base = entry.base.data, *data = entry.models[model].data;
  std::int64_t i = begin;
  for (; i + S::kElements <= end; i += S::kElements) {
    const Pair x = S::load(data, i), b = S::load(base, i);
    count(x.first - b.first, all_lanes());
    count(x.second - b.second, all_lanes());
  }
  for (; i < end; i += kLanes) {
    const int n = static_cast<int>(std::min<std::int64_t>(kLanes, end - i));
    count(load_partial<dtype>(data, i, n) - load_partial<dtype>(base, i, n), first_lanes(0, n));
  }
  const std::int64_t n_above = lane_sum(above), n_from = lane_sum(from);
  bracket.n_above += n_above;
  bracket.n_hi += n_from - n_above;
}

static void verify_range(const Entry& entry, int model, std::int64_t begin, std::int64_t end, Bracket& bracket) {
  switch (entry.base.dtype) {
    case DType::F32: return verify_as<DType::F32>(entry, model, begin, end, bracket);
    case DType::BF16: return verify_as<DType::BF16>(entry, model, begin, end, bracket);
    case DType::F16: return verify_as<DType::F16>(entry, model, begin, end, bracket);
  }
}

// The keys strictly inside the bracket go to `out`, which has room for n + kLanes; null only counts.
template <bool collect>
static std::int64_t scan_as(const std::uint32_t* keys, std::int64_t n, Bracket& bracket, std::uint32_t* out) {
  const I lo = (I)splat_bits(bracket.lo), hi = (I)splat_bits(bracket.hi);
  I above = {}, from_hi = {}, from_lo = {}, over_lo = {};
  std::int64_t n_taken = 0;
  const auto step = [&](I key, M valid) __attribute__((always_inline)) {
    const M over = (key > lo) & valid;
    above -= (key > hi) & valid;
    from_hi -= (key >= hi) & valid;
    from_lo -= (key >= lo) & valid;
    over_lo -= over;
    if constexpr (collect) n_taken += append(out + n_taken, (U)key, over & (key < hi));
  };
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) step((I)load<U>(keys + j), all_lanes());
  if (j < n) step((I)load<U>(keys + j), first_lanes(j, n));
  const std::int64_t n_above = lane_sum(above), n_hi = lane_sum(from_hi), n_lo = lane_sum(from_lo), n_over = lane_sum(over_lo);
  bracket.n_above += n_above;
  bracket.n_hi += n_hi - n_above;
  bracket.n_lo += n_lo - n_over;
  bracket.n_inside += std::max<std::int64_t>(0, n_over - n_hi);
  return n_taken;
}

static std::int64_t scan_keys(const std::uint32_t* keys, std::int64_t n, Bracket& bracket, std::uint32_t* out) {
  return out != nullptr ? scan_as<true>(keys, n, bracket, out) : scan_as<false>(keys, n, bracket, nullptr);
}

static std::int64_t count_equal(const std::uint32_t* keys, std::int64_t n, std::uint32_t value) {
  I count = {};
  for (std::int64_t j = 0; j < n; j += kLanes) {
    const M equal = (M)(load<U>(keys + j) == value);
    count -= j + kLanes > n ? equal & first_lanes(j, n) : equal;
  }
  return lane_sum(count);
}

static constexpr Kernels kernels(const char* name) {
  return {name, kLanes, combine_tile, measure_tile, row_masks_tile, keys_block, verify_range, scan_keys, count_equal};
}
