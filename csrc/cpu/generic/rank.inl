// Ranks of magnitudes within a row, ascending, equal ones by index. No include guard on purpose.

// Bits of |x|, in which every NaN is one key above infinity.
TVFAST_INLINE U key_of(F x) {
  const U key = bits(magnitude(x));
  return key < kNanKey ? key : splat_bits(kNanKey);
}

// Lane i becomes the sum of lanes 0 to i.
TVFAST_INLINE U running_sum(U v) {
  if constexpr (kLanes > 1) {
#pragma GCC unroll 8
    for (std::uint32_t step = 1; step < kLanes; step *= 2) {
      const U from = iota() < step ? U{} : iota() + (kLanes - step);
      v += __builtin_shuffle(U{}, v, from);
    }
  }
  return v;
}

// The last lane in all lanes.
TVFAST_INLINE U last_lane(U v) {
  if constexpr (kLanes == 1) return v;
  return __builtin_shuffle(v, splat_bits(kLanes - 1));
}

// From entries in each bin of two halves to the ranks at which the bins begin in either half.
// `n_bins` is a multiple of the lanes.
static void begin_bins(std::uint32_t* first, std::uint32_t* second, std::uint32_t n_bins) {
  U total = {};
  for (std::uint32_t bin = 0; bin < n_bins; bin += kLanes) {
    const U here = load<U>(first + bin), both = here + load<U>(second + bin);
    const U sums = running_sum(both), begin = total + sums - both;
    store(first + bin, begin);
    store(second + bin, begin + here);
    total += last_lane(sums);
  }
}

// Bins of keys by their leading 16 bits. A bfloat16 model minus a close bfloat16 base has few other
// bits, so that a bin is one key and the number of its entries so far is their order.
struct ShortKeys {
  std::uint32_t n_bins, lowest;  // bin 0 is zero

  ShortKeys(std::int64_t n, std::uint32_t largest)
      : n_bins(n < kRowOfManyBins ? 1024 : 2048),
        lowest((largest >> 16) - std::min(largest >> 16, n_bins - 1)) {}

  // The last bin that begins at or below a key.
  std::uint32_t bin(std::uint32_t key) const { return std::max(key >> 16, lowest) - lowest; }
};

// Ranks a row whose keys are short, but for a few: those come after the short key of their bin, in
// their own order. False if there are more of them, and then nothing is ranked.
static bool rank_by_counting(const std::uint32_t* keys, std::int64_t n, std::uint32_t largest,
                             Scratch& scratch, std::uint32_t* rank) {
  const ShortKeys scale(n, largest);
  const std::uint32_t n_bins = scale.n_bins, lowest = scale.lowest;
  std::uint32_t* bins = scratch.bin_of.get(n + kLanes);
  std::uint32_t* longer = scratch.longer.get(n + 2 * kLanes);
  std::int64_t n_longer = 0;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const U key = load<U>(keys + i), leading = key >> 16;
    const U bin = leading > lowest ? leading - lowest : U{};
    const M is_longer = (M)((bin == 0u ? key : key & 0xffffu) != 0u);
    store(bins + i, is_longer ? splat_bits(n_bins) : bin);  // a bin that is not looked at
    n_longer += append(longer + n_longer, static_cast<std::uint32_t>(i) + iota(), is_longer);
  }
  if (n_longer > n / kLongerKeys) return false;
  // Two halves at a time: equal keys wait for each other's counts.
  std::uint32_t* first = scratch.bins.get(2 * (n_bins + 64));
  std::uint32_t* second = first + n_bins + 64;
  std::fill_n(first, 2 * (n_bins + 64), 0u);
  const std::int64_t half = n / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    rank[i] = first[bins[i]]++;
    rank[half + i] = second[bins[half + i]]++;
  }
  if (n % 2 != 0) rank[n - 1] = second[bins[n - 1]]++;
  std::uint64_t* sorted = scratch.sorted.get(n_longer);  // (key, index), which orders as one number
  for (std::int64_t at = 0; at < n_longer; ++at) {
    const std::uint32_t key = keys[longer[at]];
    sorted[at] = std::uint64_t{key} << 32 | longer[at];
    ++second[scale.bin(key)];
  }
  first[n_bins] = second[n_bins] = 0;
  begin_bins(first, second, n_bins + kLanes);
  for (std::int64_t i = 0; i < half; ++i) rank[i] += first[bins[i]];
  for (std::int64_t i = half; i < n; ++i) rank[i] += second[bins[i]];
  std::sort(sorted, sorted + n_longer);
  std::uint32_t bin_above = n_bins, next = 0;
  for (std::int64_t at = n_longer; at-- > 0;) {
    const std::uint32_t bin = scale.bin(static_cast<std::uint32_t>(sorted[at] >> 32));
    if (bin != bin_above) next = first[bin + 1];
    bin_above = bin;
    rank[static_cast<std::uint32_t>(sorted[at])] = --next;
  }
  return true;
}

// Ranks any row. Keys are binned by their leading bits, down to 16 octaves below the largest, and
// then sorted within bins, which are small. More octaves would leave fewer bins for the three that
// hold most of a bell curve.
static void rank_by_sorting(const std::uint32_t* keys, std::int64_t n, std::uint32_t largest,
                            Scratch& scratch, std::uint32_t* rank) {
  const int bin_bits =
      std::clamp(static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n))), 6, 16);
  const int shift = 27 - bin_bits;
  const std::uint32_t last_bin = (1u << bin_bits) - 1;
  const std::uint32_t lowest = (largest >> shift) - std::min(largest >> shift, last_bin);
  const auto bin_of = [=](std::uint32_t key) { return std::max(key >> shift, lowest) - lowest; };
  std::uint32_t* start = scratch.bins.get(std::size_t{last_bin} + 1);
  std::fill_n(start, last_bin + 1, 0u);
  for (std::int64_t i = 0; i < n; ++i) ++start[bin_of(keys[i])];
  std::uint64_t* sorted = scratch.sorted.get(n);  // (key, index), which orders as one number
  std::uint32_t total = 0;
  bool large_bins = false;
  for (std::uint32_t bin = 0; bin <= last_bin; ++bin) {
    const std::uint32_t here = start[bin];
    large_bins = large_bins || here > kInsertionSort;
    start[bin] = total;
    total += here;
  }
  for (std::int64_t i = 0; i < n; ++i)
    sorted[start[bin_of(keys[i])]++] = std::uint64_t{keys[i]} << 32 | static_cast<std::uint32_t>(i);
  if (large_bins) {
    // After the scatter, start[bin] is the end of that bin.
    for (std::uint32_t bin = 0, from = 0; bin <= last_bin; from = start[bin++])
      if (start[bin] - from > kInsertionSort && !std::is_sorted(sorted + from, sorted + start[bin]))
        std::sort(sorted + from, sorted + start[bin]);
  }
  std::uint64_t previous = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint64_t moving = sorted[i];
    if (moving >= previous) {
      previous = moving;
      continue;
    }
    std::int64_t to = i;
    for (; to > 0 && sorted[to - 1] > moving; --to) sorted[to] = sorted[to - 1];
    sorted[to] = moving;
  }
  for (std::int64_t i = 0; i < n; ++i)
    rank[static_cast<std::uint32_t>(sorted[i])] = static_cast<std::uint32_t>(i);
}

// `row` has room for a vector behind its n elements, which is set to zero.
static void rank_row(float* row, std::int64_t n, Scratch& scratch, std::uint32_t* rank) {
  store(row + n, F{});
  std::uint32_t* keys = scratch.keys.get(n + kLanes);
  U largest = {};
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const U key = key_of(load<F>(row + i));
    store(keys + i, key);
    largest = key > largest ? key : largest;
  }
  const std::uint32_t top = lane_max(largest);
  if (n < kFewToCount || !rank_by_counting(keys, n, top, scratch, rank))
    rank_by_sorting(keys, n, top, scratch, rank);
}
