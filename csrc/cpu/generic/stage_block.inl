// From storage to kept task vectors t_k, a block at a time in scratch memory. No include guard on
// purpose.

// Calls fn(j, lanes) for the elements begin + j of one view; the last call may hold zeros past `n`.
// Asks the second-level cache for the block behind this one: blocks of several views take turns,
// and each is too short for a core to see that it goes on. Gram matrices of three models take 0.9
// of the time on a Xeon (family 6, model 207).
template <DType dtype, class Fn>
TVFAST_INLINE void for_each_lane(const void* p, std::int64_t begin, std::int64_t n, Fn&& fn) {
  const char* ahead =
      static_cast<const char*>(p) + (begin + kMaxBlock) * static_cast<std::int64_t>(size_of(dtype));
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    __builtin_prefetch(ahead + j * static_cast<std::int64_t>(size_of(dtype)), 0, 2);
    fn(j, load_as_float<dtype>(p, begin + j));
  }
  if (j < n) fn(j, load_partial<dtype>(p, begin + j, static_cast<int>(n - j)));
}

template <class Fn>
TVFAST_INLINE void for_each(const View& view, std::int64_t begin, std::int64_t n, Fn&& fn) {
  switch (view.dtype) {
    case DType::F32: return for_each_lane<DType::F32>(view.data, begin, n, fn);
    case DType::BF16: return for_each_lane<DType::BF16>(view.data, begin, n, fn);
    case DType::F16: return for_each_lane<DType::F16>(view.data, begin, n, fn);
  }
}

static void widen(const View& view, std::int64_t begin, std::int64_t n, float* out) {
  for_each(view, begin, n, [out](std::int64_t j, F x) { store(out + j, x); });
}

// A widened block of the base or the origin, or null; there is room for one of them.
TVFAST_INLINE const float* stage_base(const View& base, std::int64_t begin, std::int64_t n,
                                      Scratch& scratch) {
  if (base.data == nullptr) return nullptr;
  float* block = scratch.base.get(kMaxBlock + 64);
  widen(base, begin, n, block);
  return block;
}

// fn(j, tau) over one model's task vector; `origin` is a block of what is subtracted, or null.
template <class Fn>
TVFAST_INLINE void for_each_tau(const View& model, const float* origin, std::int64_t begin,
                                std::int64_t n, Fn&& fn) {
  if (origin == nullptr) {
    for_each(model, begin, n, fn);
  } else {
    for_each(model, begin, n, [&](std::int64_t j, F x) __attribute__((always_inline)) {
      fn(j, x - load<F>(origin + j));
    });
  }
}

// fn(j, lanes) over one model's scores as they are compared and weighted with.
template <class Fn>
TVFAST_INLINE void for_each_score(const Entry& entry, int k, std::int64_t begin, std::int64_t n,
                                  Fn&& fn) {
  if (entry.score_maps.empty()) {
    for_each(entry.scores[k], begin, n,
             [&](std::int64_t j, F x) __attribute__((always_inline)) { fn(j, magnitude(x)); });
    return;
  }
  const ScoreMap& map = entry.score_maps[k];
  const F scale = splat(map.scale), shift = splat(map.shift), floor = splat(map.floor);
  for_each(entry.scores[k], begin, n, [&](std::int64_t j, F x) __attribute__((always_inline)) {
    fn(j, magnitude(mapped_score(x, scale, shift, floor)));
  });
}

// Which of the tie ranks of consecutive elements are below a cut.
struct TieCut {
  Tie tie;
  std::uint64_t index;  // global index of the block's first element
  std::uint64_t cut, key;

  TVFAST_INLINE_MEMBER M under(std::int64_t j) const {
    if (cut == kOpenCut) return all_lanes();
    const std::uint64_t at = index + static_cast<std::uint64_t>(j);
    if (tie == Tie::INDEX) {
      const std::uint64_t n_under = cut > at ? std::min<std::uint64_t>(cut - at, kLanes) : 0;
      return (M)(iota() < static_cast<std::uint32_t>(n_under));
    }
    if (cut >> 32) return all_lanes();
    const std::uint32_t low = static_cast<std::uint32_t>(at),
                        high = static_cast<std::uint32_t>(at >> 32);
    const U index_low = low + iota();
    const U index_high = high + ((index_low < low) ? splat_bits(1u) : splat_bits(0u));
    const U hash = tie_hash(mixed_index(index_low * kMixIndex + index_high * kMixHigh),
                            splat_bits(hash_multiplier(key)));
    return (M)(hash < static_cast<std::uint32_t>(cut));
  }
};

// The keep test of one model on a block of task vector: lanes of `tau` at j to lanes of survivors.
struct KeepBlock {
  const Program& program;
  const ModelScalars& scalars;
  const float* score;  // |score| or variance
  const std::uint32_t* draws;
  const std::uint32_t* ranks;
  const std::uint64_t* mask;
  std::int64_t begin, n_elements;  // of the block within the entry, of the entry
  TieCut lo_cut, hi_cut;

  TVFAST_INLINE_MEMBER M band(F a, std::int64_t j) const {
    const F lo = splat(scalars.lo), hi = splat(scalars.hi);
    if (program.tie == Tie::GE) return in_band(a, lo, hi);
    const M tied = (a == lo) | (a == hi);
    if (mask_bits(tied) == 0) return in_band(a, lo, hi);
    return in_band_ties(a, lo, hi, lo_cut.under(j), hi_cut.under(j));
  }

  // What the bit plane says.
  TVFAST_INLINE_MEMBER M in_plane(std::int64_t j, F tau) const {
    const std::int64_t i = begin + j;
    const int at = static_cast<int>(i & 63);
    // Blocks of ranked rows may begin anywhere; what lies past the plane's last word is not read.
    std::uint64_t word = mask[i >> 6] >> at;
    if (at + kLanes > 64 && i + 64 - at < n_elements) word |= mask[(i >> 6) + 1] << (64 - at);
    return from_mask_bits(static_cast<std::uint32_t>(word)) | is_nan(tau);
  }

  TVFAST_INLINE_MEMBER M operator()(std::int64_t j, F tau) const {
    switch (program.keep) {
      case Keep::ALL: return all_lanes();
      case Keep::BAND: return band(magnitude(tau), j);
      case Keep::SCORE:
      case Keep::VARIANCE: return band(load<F>(score + j), j) | is_nan(tau);
      case Keep::RANDOM: {
        if (scalars.limit >= kAlways) return all_lanes();
        return (M)(load<U>(draws + j) < static_cast<std::uint32_t>(scalars.limit)) | is_nan(tau);
      }
      case Keep::RANDOM_BY_RANK:
        if (mask != nullptr) return in_plane(j, tau);
        return RankLimit(scalars, load<U>(ranks + j)).keeps(load<U>(draws + j)) | is_nan(tau);
      case Keep::BAND_BY_RANK: {
        const U rank = load<U>(ranks + j);
        const std::uint32_t lo =
            static_cast<std::uint32_t>(std::clamp<std::int64_t>(scalars.rank_lo, 0, 0xffffffff));
        const std::uint32_t hi =
            static_cast<std::uint32_t>(std::clamp<std::int64_t>(scalars.rank_hi, 0, 0xffffffff));
        return ((M)(rank >= lo) & (M)(rank < hi)) | is_nan(tau);
      }
      case Keep::MASK: return in_plane(j, tau);
    }
    return all_lanes();
  }
};

// Population variance across models, in float64 rounded once.
static void variance_block(const float* const* taus, int n_models, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    double sum = 0.0;
    for (int k = 0; k < n_models; ++k) sum += static_cast<double>(taus[k][i]);
    const double mean = sum / n_models;
    double spread = 0.0;
    for (int k = 0; k < n_models; ++k) {
      const double apart = static_cast<double>(taus[k][i]) - mean;
      spread += apart * apart;
    }
    out[i] = static_cast<float>(spread / n_models);
  }
}

// One block of a tile with everything that its keep stage needs.
struct BlockCall {
  const TileCall& tile;
  std::int64_t begin, n;
  RowRanks ranks = {};        // set when the keep stage ranks rows
  float* row_taus = nullptr;  // task vectors, strided as the ranks are, if ranking has staged them
  const std::uint64_t* row_kept = nullptr;  // bits of what draws keep of a row, instead of ranks

  bool staged() const { return row_taus != nullptr; }
  std::int64_t stride() const { return kMaxBlock + 64; }
  float* tau(int k) const {
    if (staged()) return row_taus + k * ranks.stride + (begin - ranks.begin);
    return tile.scratch.taus.get(stride() * tile.n_models()) + k * stride();
  }
  const std::uint64_t* kept(int k) const { return row_kept + k * ((ranks.stride + 63) / 64); }
};

// Stages the task vectors of one row, of every model, and ranks them; or draws what is kept of
// them, where that is all that ranks are for.
static BlockCall rank_tile_row(const TileCall& call, std::int64_t row_begin,
                               std::int64_t row_length) {
  Scratch& scratch = call.scratch;
  const std::int64_t stride = row_length + 64;
  float* taus = scratch.rows.get(stride * call.n_models());
  for (std::int64_t i = 0; i < row_length; i += kMaxBlock) {
    const std::int64_t n = std::min(kMaxBlock, row_length - i);
    const float* origin = stage_base(call.entry.origin(), row_begin + i, n, scratch);
    for (int k = 0; k < call.n_models(); ++k) {
      float* tau = taus + k * stride + i;
      for_each_tau(call.entry.models[k], origin, row_begin + i, n,
                   [tau](std::int64_t j, F x) { store(tau + j, x); });
    }
  }
  if (call.program.keep == Keep::RANDOM_BY_RANK && call.program.gain == Gain::MODEL) {
    const std::int64_t n_words = (stride + 63) / 64;
    std::uint64_t* kept = scratch.kept.get(n_words * call.n_models());
    const std::uint64_t index = static_cast<std::uint64_t>(call.offset + row_begin);
    for (int k = 0; k < call.n_models(); ++k)
      draw_row(call.models[k], taus + k * stride, row_length, index, scratch, kept + k * n_words);
    return {call, row_begin, row_length, {nullptr, row_begin, stride}, taus, kept};
  }
  std::uint32_t* ranks = scratch.ranks.get(stride * call.n_models());
  for (int k = 0; k < call.n_models(); ++k)
    rank_row(taus + k * stride, row_length, scratch, ranks + k * stride);
  return {call, row_begin, row_length, {ranks, row_begin, stride}, taus};
}

template <class Fn>
static void for_each_block(const TileCall& call, Fn&& fn) {
  const auto cut = [&](const BlockCall& whole) {
    const std::int64_t length = block_length(call.n_models()), end = whole.begin + whole.n;
    for (std::int64_t i = whole.begin; i < end; i += length)
      fn(BlockCall{call, i, std::min(length, end - i), whole.ranks, whole.row_taus,
                   whole.row_kept});
  };
  if (!ranks_rows(call.program.keep) || call.ranks.data != nullptr)
    return cut({call, call.begin, call.end - call.begin, call.ranks});
  std::int64_t row = call.entry.row_length();
  for (std::int64_t start = call.begin; start < call.end; start += row) {
    row = std::min(row, call.end - start);  // the last row of a tensor may be short
    cut(rank_tile_row(call, start, row));
  }
}

// Takes from `score` the entries of model k that other models' scores rule out.
static void cross_scores(const BlockCall& block, int k, float* score) {
  const TileCall& call = block.tile;
  const std::uint64_t index = static_cast<std::uint64_t>(call.offset + block.begin);
  for (int other = 0; other < call.n_models(); ++other) {
    if (other == k) continue;
    const ModelScalars& scalars = call.models[other];
    const KeepBlock keep{call.program,
                         scalars,
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr,
                         block.begin,
                         call.entry.n,
                         TieCut{call.program.tie, index, scalars.lo_cut, scalars.key},
                         TieCut{call.program.tie, index, scalars.hi_cut, scalars.key}};
    const bool winner = call.program.cross == Cross::WINNER;
    for_each_score(call.entry, other, block.begin, block.n, [&](std::int64_t j, F theirs) {
      const F own = load<F>(score + j);
      store(score + j, unless_lost(own, winner ? theirs >= own : keep.band(theirs, j)));
    });
  }
}

// Keep test of model k; `score` holds the variance if the program asks for it, draws and scores are
// staged here.
static KeepBlock keep_block(const BlockCall& block, int k, const float* variance) {
  const TileCall& call = block.tile;
  const ModelScalars& scalars = call.models[k];
  const std::uint64_t index = static_cast<std::uint64_t>(call.offset + block.begin);
  const Keep keep = call.program.keep;
  KeepBlock result{call.program,
                   scalars,
                   variance,
                   nullptr,
                   nullptr,
                   nullptr,
                   block.begin,
                   call.entry.n,
                   TieCut{call.program.tie, index, scalars.lo_cut, scalars.key},
                   TieCut{call.program.tie, index, scalars.hi_cut, scalars.key}};
  if (keep == Keep::SCORE) {
    float* score = call.scratch.score.get(block.stride());
    for_each_score(call.entry, k, block.begin, block.n,
                   [score](std::int64_t j, F x) { store(score + j, x); });
    if (call.program.cross != Cross::NONE) cross_scores(block, k, score);
    result.score = score;
  }
  if (block.row_kept != nullptr) {
    result.mask = block.kept(k);
    result.begin = block.begin - block.ranks.begin;
    result.n_elements = block.ranks.stride;
    return result;
  }
  if (keep == Keep::RANDOM_BY_RANK || (keep == Keep::RANDOM && scalars.limit < kAlways))
    result.draws = draw_block(scalars.key, index, block.n, call.scratch);
  if (ranks_rows(keep)) result.ranks = block.ranks.of(k, block.begin);
  if (keep == Keep::MASK) result.mask = call.entry.masks[k];
  return result;
}

// Probability by which model k's survivors are divided.
TVFAST_INLINE F probability(const KeepBlock& keep, std::int64_t j) {
  const F prob = splat(keep.scalars.prob);
  if (keep.ranks == nullptr) return prob;
  return prob + __builtin_convertvector(load<U>(keep.ranks + j), F) * splat(keep.scalars.prob_step);
}

// Stages the task vectors of every model, unless they are, and calls seen(k, tau) on
// each.
template <class Seen>
static void stage_taus(const BlockCall& block, const float* origin, Seen&& seen) {
  const TileCall& call = block.tile;
  for (int k = 0; k < call.n_models(); ++k) {
    float* tau = block.tau(k);
    if (!block.staged())
      for_each_tau(call.entry.models[k], origin, block.begin, block.n,
                   [tau](std::int64_t j, F x) { store(tau + j, x); });
    seen(k, tau);
  }
}

// How many models have an entry that is not zero.
TVFAST_INLINE F count_present(const BlockCall& block, std::int64_t j) {
  F n_present = splat(0.0f);
  for (int k = 0; k < block.tile.n_models(); ++k)
    n_present += masked(not_zero(load<F>(block.tau(k) + j)), splat(1.0f));
  return n_present;
}

// What the first model's entries are multiplied by, and the second's, from how far they are apart.
static void stage_nearness(const BlockCall& block, float* first, float* second) {
  const float *x = block.tau(0), *y = block.tau(1);
  const F limit = splat(block.tile.models[1].weight),
          floor = splat(block.tile.tensor.divisor_floor);
  for (std::int64_t j = 0; j < block.n; j += kLanes) {
    const F share = nearness(load<F>(x + j), load<F>(y + j), limit, floor);
    store(first + j, splat(1.0f) - share);
    store(second + j, share);
  }
}

// [K] what weighs the models' entries; null pointers where the program weighs by model alone. The
// kept and rescaled entries are staged.
static std::vector<const float*> stage_shares(const BlockCall& block) {
  const TileCall& call = block.tile;
  const int n_models = call.n_models();
  std::vector<const float*> shares(n_models, nullptr);
  if (call.program.weighting == Weighting::MODEL) return shares;
  float* all = call.scratch.shares.get(block.stride() * n_models);
  for (int k = 0; k < n_models; ++k) shares[k] = all + k * block.stride();
  switch (call.program.weighting) {
    case Weighting::MODEL: break;
    case Weighting::SCORE:
      for (int k = 0; k < n_models; ++k) {
        float* share = all + k * block.stride();
        for_each_score(call.entry, k, block.begin, block.n,
                       [share](std::int64_t j, F x) { store(share + j, x); });
      }
      break;
    case Weighting::NEARNESS: stage_nearness(block, all, all + block.stride()); break;
    case Weighting::ALONE:
      for (std::int64_t j = 0; j < block.n; j += kLanes) {
        const F n_present = count_present(block, j);
        for (int k = 0; k < n_models; ++k)
          store(all + k * block.stride() + j,
                weight_alone(n_present, splat(call.models[k].weight)));
      }
      break;
  }
  return shares;
}

static const float* stage_variance(const BlockCall& block) {
  if (block.tile.program.keep != Keep::VARIANCE) return nullptr;
  std::vector<const float*> taus;
  for (int k = 0; k < block.tile.n_models(); ++k) taus.push_back(block.tau(k));
  float* variance = block.tile.scratch.score.get(block.stride());
  variance_block(taus.data(), block.tile.n_models(), block.n, variance);
  return variance;
}
