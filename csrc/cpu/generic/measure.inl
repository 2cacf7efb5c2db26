// measure: sums, counts and keys of a block. No include guard on purpose.

// The lanes from j on that lie before n.
TVFAST_INLINE M first_lanes(std::int64_t j, std::int64_t n) {
  return (M)(iota() < static_cast<std::uint32_t>(std::min<std::int64_t>(n - j, kLanes)));
}

static void count_nonfinite(const View& view, std::int64_t begin, std::int64_t n,
                            std::int64_t& total) {
  I count = {};
  for_each(view, begin, n,
           [&](std::int64_t, F x) { count -= (I)((bits(x) & 0x7f800000u) == 0x7f800000u); });
  total += lane_sum(count);
}

// Conflicts among the kept t_k, and the sum of elected signs before the zero rule. Rescales the
// block's taus.
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
  const Weights weighed{weights.data(), stage_shares(block)};
  I signs = {};
  for (std::int64_t j = 0; j < block.n; j += kLanes)
    signs += __builtin_convertvector(sign_of(vote(program, taus.data(), weighed, n_models, j)), I);
  moments.elected += lane_sum(signs);
}

// Sets `n` <= 64 bits of a plane from bit i on. Rows may begin anywhere in a word, and two threads
// may share one.
static void set_bits(std::uint64_t* words, std::int64_t i, std::uint64_t bits, std::int64_t n) {
  const int at = static_cast<int>(i & 63);
  if (at == 0 && n == 64) {
    words[i >> 6] = bits;
    return;
  }
  std::atomic_ref<std::uint64_t>(words[i >> 6]).fetch_or(bits << at, std::memory_order_relaxed);
  if (at + n > 64)
    std::atomic_ref<std::uint64_t>(words[(i >> 6) + 1])
        .fetch_or(bits >> (64 - at), std::memory_order_relaxed);
}

// Entries that are the only one present among the kept t_k.
static void count_alone(const BlockCall& block, Moments& moments) {
  float* n_present = block.tile.scratch.shares.get(block.stride());
  for (std::int64_t j = 0; j < block.n; j += kLanes) store(n_present + j, count_present(block, j));
  for (int k = 0; k < block.tile.n_models(); ++k) {
    const float* tau = block.tau(k);
    I count = {};
    for (std::int64_t j = 0; j < block.n; j += kLanes)
      count -= (load<F>(n_present + j) == splat(1.0f)) & not_zero(load<F>(tau + j));
    moments.n_alone[k] += lane_sum(count);
  }
}

// Leaves of a block's task vector what the keep stage keeps; counts it, and sets bits of planes.
static void keep_and_count(const BlockCall& block, int k, const KeepBlock& keep, unsigned wants,
                           Moments& moments) {
  const Entry& entry = block.tile.entry;
  const std::int64_t n = block.n;
  float* tau = block.tau(k);
  I kept_count = {}, nonzero_count = {};
  std::uint64_t word = 0;
  for (std::int64_t j = 0; j < n; j += kLanes) {
    const F x = load<F>(tau + j);
    const M kept = keep(j, x) & first_lanes(j, n);
    const F t = masked(kept, x);
    store(tau + j, t);
    kept_count -= kept;
    nonzero_count -= not_zero(t);
    if (!(wants & kPlanes)) continue;
    word |= std::uint64_t{mask_bits(kept)} << (j & 63);
    if (((j + kLanes) & 63) != 0 && j + kLanes < n) continue;
    const std::int64_t first = j & ~std::int64_t{63};
    set_bits(entry.masks[k], block.begin + first, word, std::min<std::int64_t>(64, n - first));
    word = 0;
  }
  if (wants & COUNTS) {
    moments.n_kept[k] += lane_sum(kept_count);
    moments.n_nonzero[k] += lane_sum(nonzero_count);
  }
}

// Adds the products of the block's task vectors with each other, or of each with itself.
static void add_gram(const BlockCall& block, unsigned wants, float* largest, Moments& moments) {
  const int n_models = block.tile.n_models();
  const std::int64_t n = block.n;
  for (int k = 0; k < n_models; ++k) largest[k] = largest_of(block.tau(k), n);
  for (int a = 0; a < n_models; ++a) {
    Products products(block.tau(a), largest[a], n);
    for (int b = a; b < (wants & GRAM ? n_models : a + 1); ++b) {
      if ((wants & LAST) != 0 && b != a && b != n_models - 1) continue;
      products.add(block.tau(b), largest[b], moments.gram[a * n_models + b]);
    }
    products.flush();
  }
}

static void measure_blocks(const TileCall& call, unsigned wants, float* largest, Moments& moments) {
  const Entry& entry = call.entry;
  const int n_models = call.n_models();
  const bool asks_keep = call.program.keep != Keep::ALL || (wants & (COUNTS | kPlanes)) != 0;
  for_each_block(call, [&](const BlockCall& block) {
    const std::int64_t n = block.n;
    const float* origin =
        block.staged() ? nullptr : stage_base(entry.origin(), block.begin, n, call.scratch);
    if (wants & COUNTS) {
      if (entry.base.data != nullptr)
        count_nonfinite(entry.base, block.begin, n, moments.n_base_nonfinite);
      for (int k = 0; k < n_models; ++k)
        count_nonfinite(entry.models[k], block.begin, n, moments.n_nonfinite[k]);
    }
    stage_taus(block, origin, [&](int k, float* tau) {
      // What lies past the end must not count.
      if (n % kLanes != 0) store(tau + n, F{});
      if (wants & L1_BEFORE)
        add_block(moments.l1_before[k], n,
                  [tau](std::int64_t j) { return widened_magnitude(tau + j); });
    });
    const float* variance = stage_variance(block);
    for (int k = 0; k < n_models; ++k) {
      float* tau = block.tau(k);
      if (asks_keep) keep_and_count(block, k, keep_block(block, k, variance), wants, moments);
      if (wants & L1)
        add_block(moments.l1[k], n, [tau](std::int64_t j) { return widened_magnitude(tau + j); });
    }
    if ((wants & DOTS) && !entry.scores.empty()) {
      float* score = call.scratch.score.get(block.stride());
      for (int k = 0; k < n_models; ++k) {
        const View& with = entry.scores[k];
        // The task vectors of one gradient: it is staged once.
        if (k == 0 || with.data != entry.scores[k - 1].data)
          for_each(with, block.begin, n, [score](std::int64_t j, F x) { store(score + j, x); });
        const float* tau = block.tau(k);
        add_block(moments.dots[k], n,
                  [tau, score](std::int64_t j) { return widened(tau + j) * widened(score + j); });
      }
    }
    if (wants & (GRAM | SQUARES)) add_gram(block, wants, largest, moments);
    if (wants & ALONE) count_alone(block, moments);
    if (wants & VOTES) count_votes(block, variance, moments);
  });
}

static void measure_tile(const TileCall& call, unsigned wants, Moments& moments) {
  float* largest = call.scratch.largest.get(call.n_models());
  const auto add_blocks = [&](std::int64_t begin, std::int64_t end) {
    TileCall part = call;
    part.begin = begin;
    part.end = end;
    measure_blocks(part, wants, largest, moments);
  };
  if (!summed_in_units(call, wants, moments.gram.data(), largest, add_blocks))
    measure_blocks(call, wants, largest, moments);
}

static void keys_block(const Entry& entry, Keep keep, int model, std::int64_t begin, std::int64_t n,
                       Scratch& scratch, std::uint32_t* out) {
  const auto put_key = [out](std::int64_t j, F x)
                           __attribute__((always_inline)) { store(out + j, key_of(x)); };
  if (keep == Keep::SCORE) {
    for_each_score(entry, model, begin, n, put_key);
    return;
  }
  const float* origin = stage_base(entry.origin(), begin, n, scratch);
  if (keep != Keep::VARIANCE) {
    for_each_tau(entry.models[model], origin, begin, n, put_key);
    return;
  }
  const int n_models = static_cast<int>(entry.models.size());
  const std::int64_t stride = kMaxBlock + 64;
  float* taus = scratch.taus.get(stride * n_models);
  std::vector<const float*> of_model;
  for (int k = 0; k < n_models; ++k) {
    float* tau = taus + k * stride;
    for_each_tau(entry.models[k], origin, begin, n,
                 [tau](std::int64_t j, F x) { store(tau + j, x); });
    of_model.push_back(tau);
  }
  float* variance = scratch.score.get(stride);
  variance_block(of_model.data(), n_models, n, variance);
  for (std::int64_t j = 0; j < n; j += kLanes) store(out + j, key_of(load<F>(variance + j)));
}

// All models in one loop: a core reads several streams faster than one. `two_ends` counts both ends
// of the brackets and collects what is inside; otherwise a bracket is but one value.
template <DType dtype, int n_models, bool two_ends>
static void scan_taus_as(const Entry& entry, std::int64_t begin, std::int64_t end,
                         const TauScan* scans) {
  using S = Step<dtype>;
  I above[n_models] = {}, from_hi[n_models] = {}, above_lo[n_models] = {}, from_lo[n_models] = {};
  I hi[n_models], lo[n_models];
  std::uint32_t* out[n_models];
  const void *base = entry.base.data, *data[n_models];
  for (int k = 0; k < n_models; ++k) {
    hi[k] = (I)splat_bits(scans[k].bracket->hi);
    lo[k] = (I)splat_bits(scans[k].bracket->lo);
    data[k] = entry.models[scans[k].model].data;
    out[k] = scans[k].out;
  }
  std::int64_t i = begin;
  for (; i + S::kElements <= end; i += S::kElements) {
    prefetch<dtype>(base, i);
    const Pair b = S::load(base, i);
    for (int k = 0; k < n_models; ++k) {
      prefetch<dtype>(data[k], i);
      const Pair x = S::load(data[k], i);
      const I first = (I)bits(magnitude(x.first - b.first)),
              second = (I)bits(magnitude(x.second - b.second));
      above[k] = tally(tally(above[k], first > hi[k]), second > hi[k]);
      from_hi[k] = tally(tally(from_hi[k], first >= hi[k]), second >= hi[k]);
      if constexpr (two_ends) {
        above_lo[k] = tally(tally(above_lo[k], first > lo[k]), second > lo[k]);
        from_lo[k] = tally(tally(from_lo[k], first >= lo[k]), second >= lo[k]);
        const M first_inside = (first > lo[k]) & (first < hi[k]),
                second_inside = (second > lo[k]) & (second < hi[k]);
        if (out[k] != nullptr && mask_bits(first_inside | second_inside) != 0) {
          out[k] += append(out[k], (U)first, first_inside);
          out[k] += append(out[k], (U)second, second_inside);
        }
      }
    }
  }
  for (int k = 0; k < n_models; ++k) {
    for (std::int64_t j = i; j < end; j += kLanes) {
      const int n = static_cast<int>(std::min<std::int64_t>(kLanes, end - j));
      const I key =
          (I)bits(magnitude(load_partial<dtype>(data[k], j, n) - load_partial<dtype>(base, j, n)));
      const M valid = first_lanes(0, n);
      above[k] = tally(above[k], (key > hi[k]) & valid);
      from_hi[k] = tally(from_hi[k], (key >= hi[k]) & valid);
      above_lo[k] = tally(above_lo[k], (key > lo[k]) & valid);
      from_lo[k] = tally(from_lo[k], (key >= lo[k]) & valid);
      if (two_ends && out[k] != nullptr)
        out[k] += append(out[k], (U)key, (key > lo[k]) & (key < hi[k]) & valid);
    }
    Bracket& bracket = *scans[k].bracket;
    const std::int64_t n_above = lane_sum(above[k]), n_from_hi = lane_sum(from_hi[k]);
    bracket.n_above += n_above;
    bracket.n_hi += n_from_hi - n_above;
    if constexpr (two_ends) {
      const std::int64_t n_above_lo = lane_sum(above_lo[k]);
      bracket.n_lo += lane_sum(from_lo[k]) - n_above_lo;
      bracket.n_inside +=
          std::max<std::int64_t>(0, n_above_lo - n_from_hi);  // both ends are one where lo == hi
      if (out[k] != nullptr) *scans[k].n_taken += out[k] - scans[k].out;
    }
  }
}

template <DType dtype, int n_models>
static void scan_taus_of(const Entry& entry, std::int64_t begin, std::int64_t end,
                         const TauScan* scans) {
  bool two_ends = false;
  for (int k = 0; k < n_models; ++k)
    two_ends = two_ends || scans[k].bracket->lo != scans[k].bracket->hi;
  if (two_ends) {
    scan_taus_as<dtype, n_models, true>(entry, begin, end, scans);
  } else {
    scan_taus_as<dtype, n_models, false>(entry, begin, end, scans);
  }
}

template <DType dtype>
static void scan_taus_typed(const Entry& entry, std::int64_t begin, std::int64_t end,
                            const TauScan* scans, int n) {
  switch (n) {
    case 1: return scan_taus_of<dtype, 1>(entry, begin, end, scans);
    case 2: return scan_taus_of<dtype, 2>(entry, begin, end, scans);
    case 3: return scan_taus_of<dtype, 3>(entry, begin, end, scans);
    case 4: return scan_taus_of<dtype, 4>(entry, begin, end, scans);
  }
}

static void scan_taus(const Entry& entry, std::int64_t begin, std::int64_t end,
                      const TauScan* scans, int n) {
  switch (entry.base.dtype) {
    case DType::F32: return scan_taus_typed<DType::F32>(entry, begin, end, scans, n);
    case DType::BF16: return scan_taus_typed<DType::BF16>(entry, begin, end, scans, n);
    case DType::F16: return scan_taus_typed<DType::F16>(entry, begin, end, scans, n);
  }
}

// The keys strictly inside the bracket go to `out`, which has room for n + kLanes; null only
// counts.
template <bool collect>
static std::int64_t scan_as(const std::uint32_t* keys, std::int64_t n, Bracket& bracket,
                            std::uint32_t* out) {
  const I lo = (I)splat_bits(bracket.lo), hi = (I)splat_bits(bracket.hi);
  I above = {}, from_hi = {}, from_lo = {}, over_lo = {};
  std::int64_t n_taken = 0, j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const I key = (I)load<U>(keys + j);
    above = tally(above, key > hi);
    from_hi = tally(from_hi, key >= hi);
    from_lo = tally(from_lo, key >= lo);
    over_lo = tally(over_lo, key > lo);
    if constexpr (collect) n_taken += append(out + n_taken, (U)key, (key > lo) & (key < hi));
  }
  std::int64_t n_above = lane_sum(above), n_from_hi = lane_sum(from_hi),
               n_from_lo = lane_sum(from_lo);
  std::int64_t n_over_lo = lane_sum(over_lo);
  if (j < n) {
    const I key = (I)load<U>(keys + j);
    const M valid = first_lanes(j, n);
    n_above -= lane_sum((key > hi) & valid);
    n_from_hi -= lane_sum((key >= hi) & valid);
    n_from_lo -= lane_sum((key >= lo) & valid);
    n_over_lo -= lane_sum((key > lo) & valid);
    if constexpr (collect)
      n_taken += append(out + n_taken, (U)key, (key > lo) & (key < hi) & valid);
  }
  bracket.n_above += n_above;
  bracket.n_hi += n_from_hi - n_above;
  bracket.n_lo += n_from_lo - n_over_lo;
  bracket.n_inside +=
      std::max<std::int64_t>(0, n_over_lo - n_from_hi);  // both ends are one where lo == hi
  return n_taken;
}

static std::int64_t scan_keys(const std::uint32_t* keys, std::int64_t n, Bracket& bracket,
                              std::uint32_t* out) {
  return out != nullptr ? scan_as<true>(keys, n, bracket, out)
                        : scan_as<false>(keys, n, bracket, nullptr);
}

static std::int64_t count_equal(const std::uint32_t* keys, std::int64_t n, std::uint32_t value) {
  I count = {};
  for (std::int64_t j = 0; j < n; j += kLanes) {
    const M equal = (M)(load<U>(keys + j) == value);
    count -= j + kLanes > n ? equal & first_lanes(j, n) : equal;
  }
  return lane_sum(count);
}
