// combine without scratch memory, for the common programs on tensors of one storage type:
// everything stays in registers or on the stack from load to store. A step takes two vectors at a
// time, because 16-bit storage unpacks fastest into even and odd elements. Same stages in the same
// order as combine.inl, so the same bits. No include guard on purpose.

struct Pair {
  F first, second;
};

// Asks the first-level cache for what the loop will read 2 KiB later. Measured on an EPYC with
// AVX-512 (family 26, 48 KiB of first level), base and three models of 16 bits: a counting pass
// takes 0.87 of the time that it takes with second-level prefetches 12 KiB ahead, TIES 0.80, a sum
// 0.92 of the time without any; 1.5 and 3 KiB are worse. Plain sums of 32 bits go without:
// with them eight models take 1.8 of the time, four 1.09.
template <DType dtype>
TVFAST_INLINE void prefetch(const void* p, std::int64_t i) {
  const char* ahead =
      static_cast<const char*>(p) + i * static_cast<std::int64_t>(size_of(dtype)) + 2048;
  __builtin_prefetch(ahead);
  if constexpr (dtype == DType::F32 && kLanes > 8) __builtin_prefetch(ahead + 64);
}

// Elements 2 kLanes i ... of one storage type as two vectors, and which elements the lanes of each
// hold.
template <DType dtype>
struct Step {
  static constexpr std::int64_t kElements = 2 * kLanes;

  TVFAST_INLINE Pair load(const void* p, std::int64_t i) {
    if constexpr (dtype == DType::BF16) {
      const U x = load_bits(static_cast<const std::uint16_t*>(p) + i);
      return {from_bits(x << 16), from_bits(x & 0xffff0000u)};
    } else {
      return {load_as_float<dtype>(p, i), load_as_float<dtype>(p, i + kLanes)};
    }
  }

  TVFAST_INLINE void store(void* p, std::int64_t i, Pair x, bool streaming) {
    if constexpr (dtype == DType::BF16) {
      std::uint16_t* q = static_cast<std::uint16_t*>(p) + i;
      U even = round_upper(bits(x.first)), odd = round_upper(bits(x.second));
      if (__builtin_expect(any_nan(x.first, x.second), 0)) {
        even = is_nan(x.first) ? splat_bits(0x7fc00000u) : even;
        odd = is_nan(x.second) ? splat_bits(0x7fc00000u) : odd;
      }
      const U both = (even >> 16) | (odd & 0xffff0000u);
      if (streaming) {
        put<true>(q, both);
      } else {
        put<false>(q, both);
      }
    } else if (streaming) {
      store_rounded<dtype, true>(p, i, x.first);
      store_rounded<dtype, true>(p, i + kLanes, x.second);
    } else {
      store_rounded<dtype, false>(p, i, x.first);
      store_rounded<dtype, false>(p, i + kLanes, x.second);
    }
  }

  TVFAST_INLINE U first_elements() { return dtype == DType::BF16 ? iota() * 2u : iota(); }
  TVFAST_INLINE U second_elements() {
    return dtype == DType::BF16 ? iota() * 2u + 1u : iota() + std::uint32_t{kLanes};
  }

 private:
  TVFAST_INLINE U load_bits(const std::uint16_t* p) {
    U x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
};

// What of a band a fused kernel tests. A band's upper end is at infinity unless outliers are
// dropped.
enum class Ends { NONE, LOWER, LOWER_HASHED, BOTH_HASHED };

// A model's band with its ties resolved for one tile: an entry equal to `lo` survives iff its hash
// is at most `lo_last`, one equal to `hi` iff its hash is at least `hi_first`.
struct TileBand {
  float lo, hi;
  std::uint32_t lo_last = 0xffffffffu, hi_first = 0;
};

// A number of models that is known at run time only, and at most kMostFused.
inline constexpr int kMany = 0, kMostFused = 16;
constexpr int room_for(int n_models) { return n_models == kMany ? kMostFused : n_models; }

// Scalars of the models, splat once per tile. Gains are one and the zero rule gives a sign, or the
// tile is not fused.
template <int n_models>
struct FusedScalars {
  static constexpr int kRoom = room_for(n_models);
  F weight[kRoom], lo[kRoom], above_lo[kRoom], hi[kRoom];
  U multiplier[kRoom], lo_last[kRoom], hi_first[kRoom];
  F zero, scale, divisor_floor, divisor_fill;
  bool subtracts;  // the base from the models, which are not task vectors yet
  int at_run_time;

  TVFAST_INLINE_MEMBER int count() const { return n_models == kMany ? at_run_time : n_models; }
};

template <Ends ends, int n_models>
TVFAST_INLINE F fused_keep(const FusedScalars<n_models>& s, int k, F tau, const U& mixed) {
  const F a = magnitude(tau);
  if constexpr (ends == Ends::LOWER) return masked(from_end(a, s.lo[k]), tau);
  const U hash = tie_hash(mixed, s.multiplier[k]);
  M kept = from_end_hashed(a, s.lo[k], s.above_lo[k], (M)(hash > s.lo_last[k]));
  if constexpr (ends == Ends::BOTH_HASHED)
    kept &= invert(a > s.hi[k]) & invert((a == s.hi[k]) & (M)(hash < s.hi_first[k]));
  return masked(kept, tau);
}

// A sum without a vote, one model more.
template <class Choice>
TVFAST_INLINE F fused_sum(F reduced, F t, F weight) {
  constexpr Program program = Choice::get(Program{});
  if constexpr (program.reduce == Reduce::FUSED_SUM) return fused_add(t, weight, reduced);
  return reduced + t * weight;
}

// What the sum is divided by, the same for every element.
template <class Choice, int n_models>
TVFAST_INLINE F fused_divisor(const FusedScalars<n_models>& s) {
  F divisor = splat(0.0f);
  for (int k = 0; k < s.count(); ++k) divisor += s.weight[k];
  return safe_divisor(divisor, s.divisor_floor, s.divisor_fill);
}

// Kept task vectors of a block, and the signs elected; a model's vectors lie together.
template <int n_models>
struct FusedBlock {
  static constexpr int kVectors = 32;
  F t[room_for(n_models)][kVectors], reduced[kVectors];
  U mixed[kVectors];
};

template <class Choice, int n_models>
TVFAST_INLINE F fused_vote(const FusedScalars<n_models>& s, const FusedBlock<n_models>& block,
                           int j) {
  constexpr Program program = Choice::get(Program{});
  constexpr bool weighted = program.ballot == Ballot::WEIGHTED && !Choice::kUnitWeights;
  F votes = splat(0.0f);
  for (int k = 0; k < s.count(); ++k) {
    const F ballot = weighted ? block.t[k][j] * s.weight[k] : block.t[k][j];
    votes += program.vote == Vote::COUNT ? sign_of(ballot) : ballot;
  }
  return elected(votes, s.zero);
}

// R / D under the elected sign.
template <class Choice, int n_models>
TVFAST_INLINE F fused_mean(const FusedScalars<n_models>& s, const FusedBlock<n_models>& block,
                           F sign, int j) {
  constexpr Program program = Choice::get(Program{});
  F reduced = splat(-0.0f), divisor = splat(0.0f);
  for (int k = 0; k < s.count(); ++k) {
    const F t = block.t[k][j], v = Choice::kUnitWeights ? t : t * s.weight[k];
    const F ballot = program.ballot == Ballot::WEIGHTED ? v : t;
    const M member = program.members == Members::STRICT ? agrees(ballot, sign, true)
                                                        : agrees_or_zero(ballot, sign);
    reduced += masked(member, v);
    const F share = program.divisor == Divisor::COUNT ? splat(1.0f) : s.weight[k];
    divisor = select(member, divisor + share, divisor);
  }
  return reduced / safe_divisor(divisor, s.divisor_floor, s.divisor_fill);
}

// The tie cuts of a model as a band for this tile. False if they need the staged kernel: the cut of
// Tie::INDEX lies within the tile, or every entry at infinity is to be dropped.
static bool resolve_band(const TileCall& call, const ModelScalars& m, TileBand& band) {
  const float infinity = std::numeric_limits<float>::infinity();
  band.lo = m.lo;
  band.hi = m.hi;
  if (call.program.tie == Tie::GE) return true;
  const std::uint64_t first = static_cast<std::uint64_t>(call.offset + call.begin);
  const std::uint64_t last = static_cast<std::uint64_t>(call.offset + call.end) - 1;
  const bool hashed = call.program.tie == Tie::HASH;
  // How many of the tie ranks of this tile are below a cut.
  enum { NONE, SOME, EVERY };
  const auto under = [&](std::uint64_t cut) {
    if (hashed) return cut == 0 ? NONE : cut >> 32 ? EVERY : SOME;
    return cut <= first ? NONE : cut > last ? EVERY : SOME;
  };
  const auto lo = under(m.lo_cut), hi = under(m.hi_cut);
  if (!hashed && (lo == SOME || hi == SOME)) return false;
  if (lo == NONE) {
    if (m.lo == infinity) return false;
    band.lo = std::nextafter(m.lo, infinity);
  } else if (lo == SOME) {
    if (m.lo == infinity) return false;  // no end is above it
    band.lo_last = static_cast<std::uint32_t>(m.lo_cut) - 1;
  }
  if (hi == EVERY) {
    band.hi = m.hi <= 0.0f ? -1.0f : std::nextafter(m.hi, 0.0f);
  } else if (hi == SOME) {
    band.hi_first = static_cast<std::uint32_t>(m.hi_cut);
  }
  return true;
}

// Elements [begin, end), a multiple of a step, of sums of models or task vectors.
template <class Choice, DType dtype, int n_models>
static void fused_steps(const FusedScalars<n_models>& scalars, const void* base,
                        const void* const* models, void* out, std::int64_t begin, std::int64_t end,
                        std::uint32_t, bool streaming) {
  using S = Step<dtype>;
  const FusedScalars<n_models> s = scalars;  // a copy that no store can alias
  constexpr bool divides = Choice::get(Program{}).divisor != Divisor::NONE;
  const bool has_base = base != nullptr;
  const F divisor = divides ? fused_divisor<Choice>(s) : splat(1.0f);
  constexpr bool prefetches = size_of(dtype) == 2;
  for (std::int64_t i = begin; i < end; i += S::kElements) {
    Pair b{};
    if (has_base) {
      if constexpr (prefetches) prefetch<dtype>(base, i);
      b = S::load(base, i);
    }
    // To subtract +0 changes nothing, not even the sign of a zero.
    const Pair origin = s.subtracts ? b : Pair{};
    Pair sum{splat(-0.0f), splat(-0.0f)};
    for (int k = 0; k < s.count(); ++k) {
      if constexpr (prefetches) prefetch<dtype>(models[k], i);
      const Pair x = S::load(models[k], i);
      sum.first = fused_sum<Choice>(sum.first, x.first - origin.first, s.weight[k]);
      sum.second = fused_sum<Choice>(sum.second, x.second - origin.second, s.weight[k]);
    }
    if constexpr (divides) sum = {sum.first / divisor, sum.second / divisor};
    const F first = sum.first * s.scale, second = sum.second * s.scale;
    S::store(out, i, has_base ? Pair{b.first + first, b.second + second} : Pair{first, second},
             streaming);
  }
}

// The same for TIES; element 0 has the scaled index `index`, see mixed_index. In blocks, because
// what one element needs is a chain of a hundred dependent instructions, too long for a core to
// overlap with the next one's; iterations of short loops overlap.
template <class Choice, DType dtype, Ends ends, int n_models>
static void fused_ties_steps(const FusedScalars<n_models>& scalars, const void* base,
                             const void* const* models, void* out, std::int64_t begin,
                             std::int64_t end, std::uint32_t index, bool streaming) {
  using S = Step<dtype>;
  const FusedScalars<n_models> s = scalars;  // a copy that no store can alias
  const bool has_base = base != nullptr;
  FusedBlock<n_models> block;
  constexpr std::int64_t kSteps = FusedBlock<n_models>::kVectors / 2;
  for (std::int64_t start = begin; start < end; start += kSteps * S::kElements) {
    const int n_steps =
        static_cast<int>(std::min<std::int64_t>(kSteps, (end - start) / S::kElements));
    if constexpr (ends != Ends::LOWER) {
      for (int j = 0; j < n_steps; ++j) {
        const std::uint32_t at =
            index + static_cast<std::uint32_t>(start + j * S::kElements) * kMixIndex;
        block.mixed[2 * j] = mixed_index(at + S::first_elements() * kMixIndex);
        block.mixed[2 * j + 1] = mixed_index(at + S::second_elements() * kMixIndex);
      }
    }
    for (int k = 0; k < s.count(); ++k) {
      for (int j = 0; j < n_steps; ++j) {
        const std::int64_t i = start + j * S::kElements;
        prefetch<dtype>(models[k], i);
        if (k == 0 && has_base) prefetch<dtype>(base, i);
        const Pair x = S::load(models[k], i), b = s.subtracts ? S::load(base, i) : Pair{};
        block.t[k][2 * j] = fused_keep<ends>(s, k, x.first - b.first, block.mixed[2 * j]);
        block.t[k][2 * j + 1] = fused_keep<ends>(s, k, x.second - b.second, block.mixed[2 * j + 1]);
      }
    }
    for (int j = 0; j < 2 * n_steps; ++j) block.reduced[j] = fused_vote<Choice>(s, block, j);
    for (int j = 0; j < 2 * n_steps; ++j)
      block.reduced[j] = fused_mean<Choice>(s, block, block.reduced[j], j);
    for (int j = 0; j < n_steps; ++j) {
      const std::int64_t i = start + j * S::kElements;
      const F first = block.reduced[2 * j] * s.scale, second = block.reduced[2 * j + 1] * s.scale;
      const Pair b = has_base ? S::load(base, i) : Pair{};
      S::store(out, i, has_base ? Pair{b.first + first, b.second + second} : Pair{first, second},
               streaming);
    }
  }
}

template <class Choice, DType dtype, Ends ends, int n_models>
static void fused_tile(const TileCall& call, bool streaming) {
  constexpr std::int64_t kElements = Step<dtype>::kElements;
  constexpr auto steps = [] {
    if constexpr (ends == Ends::NONE) {
      return fused_steps<Choice, dtype, n_models>;
    } else {
      return fused_ties_steps<Choice, dtype, ends, n_models>;
    }
  }();
  const Entry& entry = call.entry;
  const TensorScalars& tensor = call.tensor;
  FusedScalars<n_models> s;
  s.zero = zero_sign(call.program, tensor);
  s.scale = splat(tensor.scale);
  s.divisor_floor = splat(tensor.divisor_floor);
  s.divisor_fill = splat(tensor.divisor_fill);
  s.subtracts = entry.origin().data != nullptr;
  s.at_run_time = call.n_models();
  const int count = s.count();
  const void* models[room_for(n_models)];
  for (int k = 0; k < count; ++k) {
    const ModelScalars& m = call.models[k];
    models[k] = entry.models[k].data;
    s.weight[k] = splat(m.weight);
    TileBand band{m.lo, m.hi};
    if constexpr (ends != Ends::NONE) resolve_band(call, m, band);
    s.lo[k] = splat(band.lo);
    s.above_lo[k] = splat(std::nextafter(band.lo, std::numeric_limits<float>::infinity()));
    s.hi[k] = splat(band.hi);
    s.multiplier[k] = splat_bits(hash_multiplier(m.key));
    s.lo_last[k] = splat_bits(band.lo_last);
    s.hi_first[k] = splat_bits(band.hi_first);
  }
  // Scaled for the tie hash: the high word is the same throughout a tile.
  const std::uint32_t index =
      static_cast<std::uint32_t>(call.offset) * kMixIndex +
      static_cast<std::uint32_t>(static_cast<std::uint64_t>(call.offset + call.begin) >> 32) *
          kMixHigh;
  // Vectors that stream have to be aligned.
  const auto address = reinterpret_cast<std::uintptr_t>(entry.out) +
                       static_cast<std::uintptr_t>(call.begin) * size_of(dtype);
  const bool stream = streaming && address % (kLanes * sizeof(float)) == 0;
  const std::int64_t whole = call.end - (call.end - call.begin) % kElements;
  steps(s, entry.base.data, models, entry.out, call.begin, whole, index, stream);
  if (whole < call.end) {
    constexpr int kBase = room_for(n_models), kOut = kBase + 1;
    alignas(64) unsigned char padded[kOut + 1][kElements * sizeof(float)] = {};
    const std::size_t n_bytes = static_cast<std::size_t>(call.end - whole) * size_of(dtype);
    const std::size_t skip = static_cast<std::size_t>(whole) * size_of(dtype);
    for (int k = 0; k < count; ++k) {
      std::memcpy(padded[k], static_cast<const unsigned char*>(models[k]) + skip, n_bytes);
      models[k] = padded[k];
    }
    const void* base = entry.base.data;
    if (base != nullptr)
      base = std::memcpy(padded[kBase], static_cast<const unsigned char*>(base) + skip, n_bytes);
    steps(s, base, models, padded[kOut], 0, kElements,
          index + static_cast<std::uint32_t>(whole) * kMixIndex, false);
    std::memcpy(static_cast<unsigned char*>(entry.out) + skip, padded[kOut], n_bytes);
  }
}

// With weights of one, weighted and raw ballots, and both divisors, are the same.
template <Program program>
struct Unweighted : Fixed<program> {
  static constexpr bool kUnitWeights = true;
};

using FusedTile = void (*)(const TileCall&, bool streaming);

template <class Choice, DType dtype, Ends ends>
static FusedTile fused_for_count(int n_models) {
  switch (n_models) {
    case 1: return fused_tile<Choice, dtype, ends, 1>;
    case 2: return fused_tile<Choice, dtype, ends, 2>;
    case 3: return fused_tile<Choice, dtype, ends, 3>;
    case 4: return fused_tile<Choice, dtype, ends, 4>;
    default: return n_models > kMostFused ? nullptr : fused_tile<Choice, dtype, ends, kMany>;
  }
}

template <class Choice, Ends ends>
static FusedTile fused_for_dtype(DType dtype, int n_models) {
  switch (dtype) {
    case DType::F32: return fused_for_count<Choice, DType::F32, ends>(n_models);
    case DType::BF16: return fused_for_count<Choice, DType::BF16, ends>(n_models);
    case DType::F16: return fused_for_count<Choice, DType::F16, ends>(n_models);
  }
  return nullptr;
}

template <class Choice>
static FusedTile fused_for_ends(Ends ends, DType dtype, int n_models) {
  switch (ends) {
    case Ends::NONE: return nullptr;
    case Ends::LOWER: return fused_for_dtype<Choice, Ends::LOWER>(dtype, n_models);
    case Ends::LOWER_HASHED: return fused_for_dtype<Choice, Ends::LOWER_HASHED>(dtype, n_models);
    case Ends::BOTH_HASHED: return fused_for_dtype<Choice, Ends::BOTH_HASHED>(dtype, n_models);
  }
  return nullptr;
}

// The ends that a tile has to test; NONE if only the staged kernel can.
static Ends ends_of(const TileCall& call) {
  const std::uint64_t first = static_cast<std::uint64_t>(call.offset + call.begin);
  const std::uint64_t last = static_cast<std::uint64_t>(call.offset + call.end) - 1;
  if (first >> 32 != last >> 32) return Ends::NONE;
  bool both = false, hashed = false;
  for (int k = 0; k < call.n_models(); ++k) {
    TileBand band{};
    if (!resolve_band(call, call.models[k], band)) return Ends::NONE;
    both = both || band.hi != std::numeric_limits<float>::infinity() || band.hi_first != 0;
    hashed = hashed || band.lo_last != 0xffffffffu;
  }
  return both ? Ends::BOTH_HASHED : hashed ? Ends::LOWER_HASHED : Ends::LOWER;
}

// The fused kernel of a tile, or null if it has none.
static FusedTile choose_fused(const TileCall& call) {
  const Entry& entry = call.entry;
  const Program& program = call.program;
  const DType dtype = entry.out_dtype;
  const bool has_base = entry.base.data != nullptr;
  if (program.gain != Gain::MODEL || (has_base && entry.base.dtype != dtype)) return nullptr;
  for (int k = 0; k < call.n_models(); ++k)
    if (entry.models[k].dtype != dtype || call.models[k].gain != 1.0f) return nullptr;
  const Program p = after_keep(program);
  const int n_models = call.n_models();
  if (program.keep == Keep::ALL) {
    if (p == kSum) return fused_for_dtype<Fixed<kSum>, Ends::NONE>(dtype, n_models);
    if (p == kFusedSum) return fused_for_dtype<Fixed<kFusedSum>, Ends::NONE>(dtype, n_models);
    if (p == kFusedMean) return fused_for_dtype<Fixed<kFusedMean>, Ends::NONE>(dtype, n_models);
    return nullptr;
  }
  if (program.keep != Keep::BAND) return nullptr;
  const Ends ends = ends_of(call);
  bool unit_weights = true;
  for (int k = 0; k < n_models; ++k) unit_weights = unit_weights && call.models[k].weight == 1.0f;
  if (unit_weights && ends == Ends::LOWER && dtype == DType::F32) {
    if (p == kCountWithZeros)
      return fused_for_count<Unweighted<kCountWithZeros>, DType::F32, Ends::LOWER>(n_models);
    if (p == kMassWithZeros)
      return fused_for_count<Unweighted<kMassWithZeros>, DType::F32, Ends::LOWER>(n_models);
  }
  if (zero_sign(program, call.tensor)[0] == 0.0f) return nullptr;
  if (unit_weights && (p == kTiesByWeight || p == kTiesByCount))
    return fused_for_ends<Unweighted<kTiesByCount>>(ends, dtype, n_models);
  if (p == kTiesByWeight) return fused_for_ends<Fixed<kTiesByWeight>>(ends, dtype, n_models);
  if (p == kTiesByCount) return fused_for_ends<Fixed<kTiesByCount>>(ends, dtype, n_models);
  return nullptr;
}

static void combine_tile(const TileCall& call, bool streaming) {
  if (const FusedTile fused = choose_fused(call)) {
    fused(call, streaming);
  } else {
    combine_staged(call, streaming);
  }
}
