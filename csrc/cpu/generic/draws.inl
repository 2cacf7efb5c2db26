// Bernoulli draws, of elements and of rows by rank. No include guard on purpose.

// Draws of elements [index, index + n); the pointer returned may be up to three words into the
// buffer.
static const std::uint32_t* draw_block(std::uint64_t key, std::uint64_t index, std::int64_t n,
                                       Scratch& scratch) {
  const std::uint64_t first = index >> 2;
  const std::int64_t n_blocks =
      static_cast<std::int64_t>(((index + static_cast<std::uint64_t>(n) + 3) >> 2) - first);
  std::uint32_t* out = scratch.draws.get(kMaxBlock + 16 * kLanes + 64);
  for (std::int64_t done = 0; done < n_blocks; done += kLanes) {
    const std::uint64_t start = first + static_cast<std::uint64_t>(done);
    const std::uint32_t low = static_cast<std::uint32_t>(start);
    U c0 = low + iota();
    // The low word wraps at most once within the lanes.
    U c1 = static_cast<std::uint32_t>(start >> 32) + ((c0 < low) ? splat_bits(1u) : splat_bits(0u));
    U c2 = {}, c3 = {};
    std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const U low0 = c0 * kPhiloxMul0, high0 = mul_high(c0, kPhiloxMul0);
      const U low1 = c2 * kPhiloxMul1, high1 = mul_high(c2, kPhiloxMul1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    interleave(out + 4 * done, c0, c1, c2, c3);
  }
  return out + (index & 3);
}

// What a draw is compared with, by rank: limit + (rank limit_step mod 2^64) / 2^32, by the halves
// of the product. `always` where the sum carries over, above every draw.
struct RankLimit {
  U limit;
  M always;

  TVFAST_INLINE_MEMBER RankLimit(const ModelScalars& scalars, U rank) {
    const std::uint32_t low = static_cast<std::uint32_t>(scalars.limit_step),
                        high = static_cast<std::uint32_t>(scalars.limit_step >> 32);
    const U rise = rank * high + mul_high(rank, low);
    limit = rise + static_cast<std::uint32_t>(scalars.limit);
    always = scalars.limit >= kAlways ? all_lanes() : (M)(limit < rise);
  }
  TVFAST_INLINE_MEMBER M keeps(U draw) const { return (M)(draw < limit) | always; }
  // The upper 16 bits; a draw of which they are all set may be above it where it is `always`.
  TVFAST_INLINE_MEMBER U upper() const { return (always ? ~U{} : limit) & 0xffff0000u; }
};

// Bins of a row's keys by their leading bits, down to 16 octaves below the largest.
struct RowBins {
  std::uint32_t shift, n_bins, lowest;

  RowBins(std::int64_t n, std::uint32_t largest) {
    const int width = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n)));
    const int bits = std::clamp(width - 2, 6, 14);
    shift = static_cast<std::uint32_t>(27 - bits);
    n_bins = 1u << bits;
    lowest = (largest >> shift) - std::min(largest >> shift, n_bins - 1);
  }
  TVFAST_INLINE_MEMBER U of(U keys) const {
    const U leading = keys >> shift;
    return leading > lowest ? leading - lowest : U{};
  }
};

// Counts the keys in each bin and replaces the counts by the limits of the bin's first and last
// rank, 16 bits each. About how many draws are to be expected between the two.
static double limits_of_bins(const ModelScalars& scalars, const std::uint16_t* bins, std::int64_t n,
                             std::uint32_t n_bins, std::uint32_t* limits) {
  std::fill_n(limits, n_bins, 0u);
  for (std::int64_t i = 0; i < n; ++i) ++limits[bins[i]];
  U total = {};
  F squares = {};
  for (std::uint32_t bin = 0; bin < n_bins; bin += kLanes) {
    const U here = load<U>(limits + bin), end = total + running_sum(here);
    const F count = __builtin_convertvector(here, F);
    squares += count * count;
    store(limits + bin,
          RankLimit(scalars, end - here).upper() | (RankLimit(scalars, end - 1u).upper() >> 16));
    total = last_lane(end);
  }
  const double rise = std::ldexp(static_cast<double>(scalars.limit_step), -64);
  return static_cast<double>(lane_sum(squares)) * rise;
}

// How many keys of a row come before key i: smaller ones, and equal ones that are further left.
// What follows the row is not smaller than any.
static std::uint32_t rank_of(const std::uint32_t* keys, std::int64_t n, std::int64_t i) {
  const I own = (I)splat_bits(keys[i]);
  I count = {};
  std::int64_t j = 0;
  for (; j + kLanes <= i; j += kLanes) count = tally(count, load<I>(keys + j) < own + 1);
  const M left = (M)(iota() < static_cast<std::uint32_t>(i - j));
  count = tally(count, load<I>(keys + j) < (left ? own + 1 : own));
  for (j += kLanes; j < n; j += kLanes) count = tally(count, load<I>(keys + j) < own);
  return static_cast<std::uint32_t>(lane_sum(count));
}

// Keys of a row that are expected to need ranks; if there are more, all are ranked.
inline constexpr double kMostUndecided = 32.0;

// Sets the bits of the entries of a row that draws keep, from global index `index` on, by the ranks
// of magnitudes. Where limits rise with ranks, a key's bin says between which two its own lies;
// only a draw between those needs its rank, one in thousands. `row` has room for a vector behind
// its n elements, which is set to zero; bits behind those are of no meaning.
static void draw_row(const ModelScalars& scalars, float* row, std::int64_t n, std::uint64_t index,
                     Scratch& scratch, std::uint64_t* kept) {
  store(row + n, F{});
  std::uint32_t* keys = scratch.keys.get(n + kLanes);
  const RowBins scale(n, store_keys(row, n, keys));
  std::uint16_t* bins = scratch.short_bins.get(n + kLanes);
  for (std::int64_t i = 0; i < n; i += kLanes) store_places(bins + i, scale.of(load<U>(keys + i)));
  std::uint32_t* limits = scratch.bins.get(scale.n_bins);
  const double undecided_draws = limits_of_bins(scalars, bins, n, scale.n_bins, limits);
  const bool wraps = scalars.limit_step != 0 &&
                     static_cast<std::uint64_t>(n - 1) > ~std::uint64_t{0} / scalars.limit_step;
  const std::uint32_t* ranks = nullptr;
  if (wraps || undecided_draws > kMostUndecided) {
    std::uint32_t* own = scratch.ranks.get(n + 64);
    rank_row(row, n, scratch, own);
    ranks = own;
  }
  std::uint32_t* undecided = scratch.longer.get(n + 2 * kLanes);
  std::uint32_t* drawn = scratch.bin_of.get(n + 2 * kLanes);
  std::int64_t n_undecided = 0;
  std::fill_n(kept, (n + 63) / 64, std::uint64_t{0});
  for (std::int64_t begin = 0; begin < n; begin += kMaxBlock) {
    const std::int64_t end = std::min(begin + kMaxBlock, n);
    const std::uint32_t* draws =
        draw_block(scalars.key, index + static_cast<std::uint64_t>(begin), end - begin, scratch);
    for (std::int64_t i = begin; i < end; i += kLanes) {
      const U draw = load<U>(draws + (i - begin));
      M is_kept;
      if (ranks != nullptr) {
        is_kept = RankLimit(scalars, load<U>(ranks + i)).keeps(draw);
      } else {
        const U limit = gathered(limits, load_places(bins + i));
        is_kept = (M)(draw < (limit & 0xffff0000u));
        const M open = invert(is_kept) & (M)((draw >> 16) <= (limit & 0xffffu));
        if (mask_bits(open) != 0) {
          append(drawn + n_undecided, draw, open);
          n_undecided +=
              append(undecided + n_undecided, static_cast<std::uint32_t>(i) + iota(), open);
        }
      }
      kept[i >> 6] |= std::uint64_t{mask_bits(is_kept)} << (i & 63);
    }
  }
  store(keys + n, splat_bits(kNanKey));
  for (std::int64_t at = 0; at < n_undecided && undecided[at] < n; ++at) {
    const std::uint32_t i = undecided[at];
    const RankLimit own(scalars, splat_bits(rank_of(keys, n, i)));
    kept[i >> 6] |= std::uint64_t{mask_bits(own.keeps(splat_bits(drawn[at]))) & 1u} << (i & 63);
  }
}
