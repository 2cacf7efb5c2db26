// Counts of magnitudes, and draws by them. No include guard on purpose.

// Bins of the values of a block, with room for a vector behind them.
static void bin_magnitudes(const View& values, std::int64_t begin, std::int64_t n,
                           std::uint32_t* bins) {
  constexpr std::uint32_t shift = kMagnitudeBinShift;
  for_each(values, begin, n,
           [bins](std::int64_t j, F x) { store(bins + j, bits(magnitude(x)) >> shift); });
}

// Adds the entries of each bin to `counts`.
static void count_magnitudes(const View& values, std::int64_t begin, std::int64_t n,
                             std::uint32_t* counts) {
  std::uint32_t bins[kMaxBlock + kLanes];
  for (std::int64_t at = 0; at < n; at += kMaxBlock) {
    const std::int64_t here = std::min(kMaxBlock, n - at);
    bin_magnitudes(values, begin + at, here, bins);
    for (std::int64_t j = 0; j < here; ++j) ++counts[bins[j]];
  }
}

static void drop_binned(const BinnedDrop& drop, std::int64_t begin, std::int64_t n,
                        Scratch& scratch) {
  std::uint32_t bins[kMaxBlock + kLanes], limits[kMaxBlock + kLanes];
  for (std::int64_t at = 0; at < n; at += kMaxBlock) {
    const std::int64_t here = std::min(kMaxBlock, n - at);
    bin_magnitudes(drop.values, begin + at, here, bins);
    for (std::int64_t j = 0; j < here; ++j) limits[j] = drop.limits[bins[j]];
    const std::uint32_t* draws =
        draw_block(drop.key, static_cast<std::uint64_t>(begin + at), here, scratch);
    float* out = drop.out + begin + at;
    for_each(drop.values, begin + at, here, [=](std::int64_t j, F x) {
      const M kept = (M)((load<U>(draws + j) >> 1) < load<U>(limits + j));
      if (j + kLanes <= here) {
        store(out + j, masked(kept, x));
      } else {
        store_partial<DType::F32>(out, j, masked(kept, x), static_cast<int>(here - j));
      }
    });
  }
}
