// combine without scratch memory, for the common programs on tensors of one storage type: everything stays in registers from load to store.
// A step takes two vectors at a time, because 16-bit storage unpacks fastest into even and odd elements. Same
// stages in the same order as combine.inl, so the same bits. No include guard on purpose.

struct Pair {
  F first, second;
};

// Elements 2 kLanes i ... of one storage type as two vectors, and which elements the lanes of each hold.
template <DType dtype>
struct Step {
  static constexpr std::int64_t kElements = 2 * kLanes;

  TVFAST_INLINE_STATIC Pair load(const void* p, std::int64_t i) {
    if constexpr (dtype == DType::BF16) {
      const U x = load_bits(static_cast<const std::uint16_t*>(p) + i);
      return {from_bits(x << 16), from_bits(x & 0xffff0000u)};
    } else {
      return {load_as_float<dtype>(p, i), load_as_float<dtype>(p, i + kLanes)};
    }
  }

  TVFAST_INLINE_STATIC void store(void* p, std::int64_t i, Pair x, bool streaming) {
    if constexpr (dtype == DType::BF16) {
      std::uint16_t* q = static_cast<std::uint16_t*>(p) + i;
      U even = round(bits(x.first)), odd = round(bits(x.second));
      const M nan = is_nan(x.first) | is_nan(x.second);
      if (__builtin_expect(mask_bits(nan) != 0, 0)) {
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

  TVFAST_INLINE_STATIC U first_elements() { return dtype == DType::BF16 ? iota() * 2u : iota(); }
  TVFAST_INLINE_STATIC U second_elements() { return dtype == DType::BF16 ? iota() * 2u + 1u : iota() + std::uint32_t{kLanes}; }

 private:
  TVFAST_INLINE_STATIC U load_bits(const std::uint16_t* p) {
    U x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  TVFAST_INLINE_STATIC U round(U u) { return u + (0x7fffu + ((u >> 16) & 1u)); }
};

// Scalars of the models, splat once per tile.
template <int n_models>
struct FusedScalars {
  F weight[n_models], gain[n_models], lo[n_models], hi[n_models];
  TieCut lo_cut[n_models], hi_cut[n_models];
  F zero;  // the elected sign of a vote of zero
  bool never_zero, unit_gain;
};

template <class Choice, Keep keep, bool ties, int n_models>
TVFAST_INLINE F fused_vector(const FusedScalars<n_models>& s, const TensorScalars& tensor, const F* tau,
                             const F* base, std::uint64_t index, U elements) {
  constexpr Program program = Choice::get(Program{});
  F t[n_models], v[n_models];
  for (int k = 0; k < n_models; ++k) {
    t[k] = tau[k];
    if constexpr (keep == Keep::BAND) {
      const F a = magnitude(tau[k]);
      M kept = in_band(a, s.lo[k], s.hi[k]);
      if constexpr (ties) {
        const M tied = (a == s.lo[k]) | (a == s.hi[k]);
        if (mask_bits(tied) != 0)
          kept = in_band_ties(a, s.lo[k], s.hi[k], s.lo_cut[k].under(index, elements), s.hi_cut[k].under(index, elements));
      }
      t[k] = masked(kept, t[k]);
    }
    if (!s.unit_gain) t[k] = t[k] * s.gain[k];
    v[k] = t[k] * s.weight[k];
  }
  F sign = s.zero;
  if constexpr (program.vote != Vote::NONE) {
    F votes = splat(0.0f);
    for (int k = 0; k < n_models; ++k) votes += program.ballot == Ballot::WEIGHTED ? v[k] : t[k];
    sign = elected(votes, s.zero);
  }
  F reduced = splat(-0.0f), divisor = splat(0.0f);
  for (int k = 0; k < n_models; ++k) {
    M member = all_lanes();
    if constexpr (program.vote != Vote::NONE) member = agrees(program.ballot == Ballot::WEIGHTED ? v[k] : t[k], sign, s.never_zero);
    if constexpr (program.reduce == Reduce::FUSED_SUM) {
      reduced = fused_add(t[k], s.weight[k], reduced);
    } else {
      reduced += program.vote == Vote::NONE ? v[k] : masked(member, v[k]);
    }
    if constexpr (program.divisor == Divisor::COUNT) divisor += masked(member, splat(1.0f));
    if constexpr (program.divisor == Divisor::WEIGHT) divisor += masked(member, s.weight[k]);
  }
  if constexpr (program.divisor != Divisor::NONE)
    reduced = reduced / safe_divisor(divisor, splat(tensor.divisor_floor), splat(tensor.divisor_fill));
  const F result = reduced * splat(tensor.scale);
  return base == nullptr ? result : *base + result;
}

// Elements [begin, end), a multiple of a step, of streams whose element 0 has global index `index`.
template <class Choice, DType dtype, Keep keep, bool ties, int n_models>
static void fused_steps(const FusedScalars<n_models>& s, const TensorScalars& tensor, const void* base,
                        const void* const* models, void* out, std::int64_t begin, std::int64_t end, std::uint64_t index,
                        bool streaming) {
  using S = Step<dtype>;
  for (std::int64_t i = begin; i < end; i += S::kElements) {
    Pair b{};
    if (base != nullptr) b = S::load(base, i);
    F first[n_models], second[n_models];
    for (int k = 0; k < n_models; ++k) {
      const Pair x = S::load(models[k], i);
      first[k] = base != nullptr ? x.first - b.first : x.first;
      second[k] = base != nullptr ? x.second - b.second : x.second;
    }
    const std::uint64_t at = index + static_cast<std::uint64_t>(i);
    Pair result;
    result.first = fused_vector<Choice, keep, ties, n_models>(s, tensor, first, base != nullptr ? &b.first : nullptr, at,
                                                              S::first_elements());
    result.second = fused_vector<Choice, keep, ties, n_models>(s, tensor, second, base != nullptr ? &b.second : nullptr, at,
                                                               S::second_elements());
    S::store(out, i, result, streaming);
  }
}

template <class Choice, DType dtype, Keep keep, bool ties, int n_models>
static void fused_tile(const TileCall& call, bool streaming) {
  constexpr std::int64_t kElements = Step<dtype>::kElements;
  constexpr auto steps = fused_steps<Choice, dtype, keep, ties, n_models>;
  const Entry& entry = call.entry;
  FusedScalars<n_models> s;
  s.zero = zero_sign(call.program, call.tensor);
  s.never_zero = s.zero[0] != 0.0f;
  s.unit_gain = true;
  const void* models[n_models];
  for (int k = 0; k < n_models; ++k) {
    const ModelScalars& m = call.models[k];
    models[k] = entry.models[k].data;
    s.weight[k] = splat(m.weight);
    s.gain[k] = splat(m.gain);
    s.lo[k] = splat(m.lo);
    s.hi[k] = splat(m.hi);
    s.lo_cut[k] = TieCut{call.program.tie, 0, m.lo_cut, m.key};
    s.hi_cut[k] = TieCut{call.program.tie, 0, m.hi_cut, m.key};
    s.unit_gain = s.unit_gain && m.gain == 1.0f;
  }
  const std::uint64_t index = static_cast<std::uint64_t>(entry.offset);
  // Vectors that stream have to be aligned.
  const auto address = reinterpret_cast<std::uintptr_t>(entry.out) + static_cast<std::uintptr_t>(call.begin) * size_of(dtype);
  const bool stream = streaming && address % (kLanes * sizeof(float)) == 0;
  const std::int64_t whole = call.end - (call.end - call.begin) % kElements;
  steps(s, call.tensor, entry.base.data, models, entry.out, call.begin, whole, index, stream);
  if (whole < call.end) {
    alignas(64) unsigned char padded[n_models + 2][kElements * sizeof(float)] = {};
    const std::size_t n_bytes = static_cast<std::size_t>(call.end - whole) * size_of(dtype);
    const std::size_t skip = static_cast<std::size_t>(whole) * size_of(dtype);
    for (int k = 0; k < n_models; ++k) {
      std::memcpy(padded[k], static_cast<const unsigned char*>(models[k]) + skip, n_bytes);
      models[k] = padded[k];
    }
    const void* base = entry.base.data;
    if (base != nullptr) base = std::memcpy(padded[n_models], static_cast<const unsigned char*>(base) + skip, n_bytes);
    steps(s, call.tensor, base, models, padded[n_models + 1], 0, kElements, index + static_cast<std::uint64_t>(whole), false);
    std::memcpy(static_cast<unsigned char*>(entry.out) + skip, padded[n_models + 1], n_bytes);
  }
  if (stream) stream_fence();
}

using FusedTile = void (*)(const TileCall&, bool streaming);

template <class Choice, DType dtype, Keep keep, bool ties>
static FusedTile fused_for_count(int n_models) {
  switch (n_models) {
    case 1: return fused_tile<Choice, dtype, keep, ties, 1>;
    case 2: return fused_tile<Choice, dtype, keep, ties, 2>;
    case 3: return fused_tile<Choice, dtype, keep, ties, 3>;
    case 4: return fused_tile<Choice, dtype, keep, ties, 4>;
    case 5: return fused_tile<Choice, dtype, keep, ties, 5>;
    default: return nullptr;
  }
}

template <class Choice, Keep keep, bool ties>
static FusedTile fused_for_dtype(DType dtype, int n_models) {
  switch (dtype) {
    case DType::F32: return fused_for_count<Choice, DType::F32, keep, ties>(n_models);
    case DType::BF16: return fused_for_count<Choice, DType::BF16, keep, ties>(n_models);
    case DType::F16: return fused_for_count<Choice, DType::F16, keep, ties>(n_models);
  }
  return nullptr;
}

// The fused kernel of a tile, or null if it has none.
static FusedTile choose_fused(const TileCall& call) {
  const Entry& entry = call.entry;
  const Program& program = call.program;
  const DType dtype = entry.out_dtype;
  if (program.gain != Gain::MODEL || (entry.base.data != nullptr && entry.base.dtype != dtype)) return nullptr;
  for (const View& model : entry.models)
    if (model.dtype != dtype) return nullptr;
  const Program p = after_keep(program);
  const int n_models = call.n_models();
  if (program.keep == Keep::ALL) {
    if (p == kSum) return fused_for_dtype<Fixed<kSum>, Keep::ALL, false>(dtype, n_models);
    if (p == kFusedSum) return fused_for_dtype<Fixed<kFusedSum>, Keep::ALL, false>(dtype, n_models);
    if (p == kFusedMean) return fused_for_dtype<Fixed<kFusedMean>, Keep::ALL, false>(dtype, n_models);
    return nullptr;
  }
  if (program.keep != Keep::BAND) return nullptr;
  bool ties = false;
  for (int k = 0; k < n_models; ++k)
    ties = ties || (program.tie != Tie::GE && (call.models[k].lo_cut != kOpenCut || call.models[k].hi_cut != 0));
  if (p == kTiesByWeight) {
    return ties ? fused_for_dtype<Fixed<kTiesByWeight>, Keep::BAND, true>(dtype, n_models)
                : fused_for_dtype<Fixed<kTiesByWeight>, Keep::BAND, false>(dtype, n_models);
  }
  if (p == kTiesByCount) {
    return ties ? fused_for_dtype<Fixed<kTiesByCount>, Keep::BAND, true>(dtype, n_models)
                : fused_for_dtype<Fixed<kTiesByCount>, Keep::BAND, false>(dtype, n_models);
  }
  return nullptr;
}

static void combine_tile(const TileCall& call, bool streaming) {
  if (const FusedTile fused = choose_fused(call)) {
    fused(call, streaming);
  } else {
    combine_staged(call, streaming);
  }
}
