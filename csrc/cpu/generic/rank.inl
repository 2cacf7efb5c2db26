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
    if (n_longer > n / kLongerKeys) return false;
  }
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

// How far apart keys of one bin are compared; larger bins are sorted. Without lanes every
// comparison is an instruction, and sorting is cheaper. Measured on an EPYC, rows of 8192 normal
// values: 2.1 ns a key with AVX-512, 2.4 with AVX2, 6.6 without vectors.
inline constexpr std::uint32_t kWindow = kLanes > 1 ? 32 : 4;

// What is added to the position of a key in its bin's order of arrival: the smaller keys that come
// after it, less the larger ones before it. Keys further apart than `distance` are in order.
TVFAST_INLINE U displacement(const std::uint32_t* keys, std::int64_t distance) {
  const I own = load<I>(keys);
  I after = {}, before = {};
  for (std::int64_t d = 1; d <= distance; ++d) {
    after = tally(after, load<I>(keys + d) < own);
    before = tally(before, load<I>(keys - d) > own);
  }
  return (U)(after - before);
}

// Consecutive places as lanes.
template <class Place>
TVFAST_INLINE U load_places(const Place* places) {
  if constexpr (sizeof(Place) == 4) {
    return load<U>(places);
  } else {
    return __builtin_convertvector(load<H>(places), U);
  }
}
template <class Place>
TVFAST_INLINE void store_places(Place* places, U v) {
  if constexpr (sizeof(Place) == 4) {
    store(places, v);
  } else {
    store(places, __builtin_convertvector(v, H));
  }
}

// What ranks are made from: the bin of each key, where bins begin, and the keys in order of bins.
template <class Place>
struct Binning {
  Place *bins, *start, *index;
};

template <class Place>
static Binning<Place> binning(std::int64_t n, std::uint32_t n_bins, Scratch& scratch,
                              [[maybe_unused]] std::uint32_t* rank) {
  if constexpr (sizeof(Place) == 4) {
    // Bins stay there until there are ranks: plans count the memory of one or the other.
    return {rank, scratch.bins.get(n_bins), scratch.longer.get(n + 2 * kLanes)};
  } else {
    return {scratch.short_bins.get(n + kLanes), scratch.short_starts.get(n_bins),
            scratch.short_index.get(n + kLanes)};
  }
}

// Sorts the bins of more than kWindow + 1 keys, which displacements do not reach across.
template <class Place>
static void sort_large_bins(const Place* end, std::uint32_t n_bins, const std::uint32_t* keys,
                            Place* index, Scratch& scratch) {
  for (std::uint32_t bin = 0, from = 0; bin < n_bins; from = end[bin++]) {
    const std::uint32_t n = end[bin] - from;
    if (n <= kWindow + 1) continue;
    std::uint64_t* sorted = scratch.sorted.get(n);  // (key, index), which orders as one number
    for (std::uint32_t j = 0; j < n; ++j)
      sorted[j] = std::uint64_t{keys[index[from + j]]} << 32 | index[from + j];
    if (std::is_sorted(sorted, sorted + n)) continue;
    std::sort(sorted, sorted + n);
    for (std::uint32_t j = 0; j < n; ++j) index[from + j] = static_cast<Place>(sorted[j]);
  }
}

// Ranks any row that a Place can count. Keys are binned by their leading bits, down to 16 octaves
// below the largest, and compared with their neighbours within bins, which are small: no branch
// depends on a key, where insertion took three times as long. More octaves would leave fewer bins
// for the three that hold most of a bell curve. Places of 16 bits keep what is written here and
// there in the first-level cache: 0.8 of the time on a Xeon (family 6, model 207), rows of 8192.
template <class Place>
static void rank_by_comparing(const std::uint32_t* keys, std::int64_t n, std::uint32_t largest,
                              Scratch& scratch, std::uint32_t* rank) {
  const int bin_bits =
      std::clamp(static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n))), 6, 16);
  const int shift = 27 - bin_bits;
  const std::uint32_t n_bins = 1u << bin_bits;
  const std::uint32_t lowest = (largest >> shift) - std::min(largest >> shift, n_bins - 1);
  const auto [bins, start, index] = binning<Place>(n, n_bins, scratch, rank);
  std::fill_n(start, n_bins, Place{0});
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const U leading = load<U>(keys + i) >> static_cast<std::uint32_t>(shift);
    store_places(bins + i, leading > lowest ? leading - lowest : U{});
  }
  for (std::int64_t i = 0; i < n; ++i) ++start[bins[i]];
  U total = {}, most = {};
  for (std::uint32_t bin = 0; bin < n_bins; bin += kLanes) {
    const U here = load_places(start + bin), sums = running_sum(here);
    store_places(start + bin, total + sums - here);
    total += last_lane(sums);
    most = here > most ? here : most;
  }
  // In order of arrival within their bins.
  for (std::int64_t i = 0; i < n; ++i) index[start[bins[i]]++] = static_cast<Place>(i);
  const std::uint32_t largest_bin = lane_max(most);
  if (largest_bin > kWindow + 1) sort_large_bins(start, n_bins, keys, index, scratch);
  // Between keys that are in order with any.
  std::uint32_t* binned = scratch.bin_of.get(n + kLanes + 2 * kWindow) + kWindow;
  std::fill_n(binned - kWindow, kWindow, 0u);
  for (std::int64_t at = 0; at < n; ++at) binned[at] = keys[index[at]];
  std::fill_n(binned + n, kWindow + kLanes, kNanKey);
  const std::int64_t distance = std::min<std::int64_t>(largest_bin - 1, kWindow);
  std::int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) {
    std::uint32_t places[kLanes];
    store(places, static_cast<std::uint32_t>(at) + iota() + displacement(binned + at, distance));
    for (int lane = 0; lane < kLanes; ++lane) rank[index[at + lane]] = places[lane];
  }
  const U places = static_cast<std::uint32_t>(at) + iota() + displacement(binned + at, distance);
  for (int lane = 0; at < n; ++at, ++lane) rank[index[at]] = places[lane];
}

// The keys of a row, and the largest of them.
static std::uint32_t store_keys(const float* row, std::int64_t n, std::uint32_t* keys) {
  U largest = {};
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const U key = key_of(load<F>(row + i));
    store(keys + i, key);
    largest = key > largest ? key : largest;
  }
  return lane_max(largest);
}

// `row` has room for a vector behind its n elements, which is set to zero.
static void rank_row(float* row, std::int64_t n, Scratch& scratch, std::uint32_t* rank) {
  store(row + n, F{});
  std::uint32_t* keys = scratch.keys.get(n + kLanes);
  const std::uint32_t top = store_keys(row, n, keys);
  if (n >= kFewToCount && rank_by_counting(keys, n, top, scratch, rank)) return;
  if (n <= std::numeric_limits<std::uint16_t>::max()) {
    rank_by_comparing<std::uint16_t>(keys, n, top, scratch, rank);
  } else {
    rank_by_comparing<std::uint32_t>(keys, n, top, scratch, rank);
  }
}
