// combine: one pass from storage to storage. No include guard on purpose.

// How a block is reduced. Fixed programs become constants in the loop; every other one runs the
// same text on a program read at run time.
template <Program fixed>
struct Fixed {
  static constexpr bool kUnitWeights = false;
  static constexpr Program get(const Program&) { return fixed; }
};
struct AtRunTime {
  static constexpr const Program& get(const Program& program) { return program; }
};

// Applies gain, or divides by the keep probability, to the kept t_k of one model.
static void rescale_block(const BlockCall& block, int k, const KeepBlock& keep) {
  const bool by_probability = block.tile.program.gain == Gain::INVERSE_PROBABILITY;
  const F gain = splat(block.tile.models[k].gain);
  float* tau = block.tau(k);
  for (std::int64_t j = 0; j < block.n; j += kLanes) {
    const F t = load<F>(tau + j);
    store(tau + j, by_probability ? t / probability(keep, j) : t * gain);
  }
}

// Kept and rescaled t_k of every model.
static void stage_kept(const BlockCall& block, const float* origin) {
  const TileCall& call = block.tile;
  const Program& program = call.program;
  if (program.gain == Gain::MODEL &&
      (program.keep == Keep::ALL || program.keep == Keep::BAND || program.keep == Keep::MASK)) {
    for (int k = 0; k < call.n_models(); ++k) {
      float* tau = block.tau(k);
      const F gain = splat(call.models[k].gain);
      if (program.keep == Keep::ALL) {
        for_each_tau(call.entry.models[k], origin, block.begin, block.n,
                     [=](std::int64_t j, F x)
                         __attribute__((always_inline)) { store(tau + j, x * gain); });
      } else if (program.keep == Keep::BAND) {
        const KeepBlock keep = keep_block(block, k, nullptr);
        for_each_tau(call.entry.models[k], origin, block.begin, block.n,
                     [&](std::int64_t j, F x) __attribute__((always_inline)) {
                       store(tau + j, masked(keep.band(magnitude(x), j), x) * gain);
                     });
      } else {
        const KeepBlock keep = keep_block(block, k, nullptr);
        for_each_tau(call.entry.models[k], origin, block.begin, block.n,
                     [&](std::int64_t j, F x) __attribute__((always_inline)) {
                       store(tau + j, masked(keep.in_plane(j, x), x) * gain);
                     });
      }
    }
    return;
  }
  stage_taus(block, origin, [](int, const float*) {});
  const float* variance = stage_variance(block);
  for (int k = 0; k < call.n_models(); ++k) {
    float* tau = block.tau(k);
    const KeepBlock keep = keep_block(block, k, variance);
    for (std::int64_t j = 0; j < block.n; j += kLanes) {
      const F x = load<F>(tau + j);
      store(tau + j, masked(keep(j, x), x));
    }
    rescale_block(block, k, keep);
  }
}

TVFAST_INLINE F zero_sign(const Program& program, const TensorScalars& tensor) {
  switch (program.zero_sign) {
    case ZeroSign::PLUS: return splat(1.0f);
    case ZeroSign::MINUS: return splat(-1.0f);
    case ZeroSign::NONE: return splat(0.0f);
    case ZeroSign::MAJORITY: return splat(tensor.majority);
  }
  return splat(0.0f);
}

// What model k's entries of a block are multiplied by.
struct Weights {
  const float* of_model;             // [K]
  std::vector<const float*> shares;  // [K], per entry

  TVFAST_INLINE_MEMBER F at(const Program& program, int k, std::int64_t j) const {
    const F weight = splat(of_model[k]);
    if (program.weighting == Weighting::MODEL) return weight;
    const F share = load<F>(shares[k] + j);
    return program.weighting == Weighting::SCORE ? weight * share : share;
  }
};

TVFAST_INLINE F vote(const Program& program, const float* const* taus, const Weights& weights,
                     int n_models, std::int64_t j) {
  F votes = splat(0.0f);
  for (int k = 0; k < n_models; ++k) {
    const F t = load<F>(taus[k] + j);
    const F ballot = program.ballot == Ballot::WEIGHTED ? t * weights.at(program, k, j) : t;
    votes += program.vote == Vote::MASS ? ballot : sign_of(ballot);
  }
  return votes;
}

// `zero` is the elected sign of a vote of zero.
template <class Choice, int fixed_models>
static void reduce_block(const Program& at_run_time, const TensorScalars& tensor, F zero,
                         const Weights& weights, const float* const* taus, int n, const float* base,
                         std::int64_t n_elements, float* out) {
  const Program program = Choice::get(at_run_time);
  const int n_models = fixed_models > 0 ? fixed_models : n;
  const F scale = splat(tensor.scale);
  const bool never_zero = zero[0] != 0.0f;
  const F divisor_floor = splat(tensor.divisor_floor), divisor_fill = splat(tensor.divisor_fill);
  for (std::int64_t j = 0; j < n_elements; j += kLanes) {
    F sign = zero;
    if (program.vote != Vote::NONE) sign = elected(vote(program, taus, weights, n_models, j), zero);
    F reduced = splat(program.reduce == Reduce::MAX_ABS ? 0.0f : -0.0f);
    F divisor = splat(0.0f);
    for (int k = 0; k < n_models; ++k) {
      const F t = load<F>(taus[k] + j);
      const F weight = weights.at(program, k, j);
      const F v = t * weight;
      M member = all_lanes();
      if (program.vote == Vote::NONE) {
        if (program.members == Members::STRICT) member = not_zero(v);
      } else {
        const F ballot = program.ballot == Ballot::WEIGHTED ? v : t;
        member = program.members == Members::STRICT ? agrees(ballot, sign, never_zero)
                                                    : agrees_or_zero(ballot, sign);
      }
      if (program.reduce == Reduce::SUM) reduced += masked(member, v);
      if (program.reduce == Reduce::FUSED_SUM)
        reduced = fused_add(masked(member, t), weight, reduced);
      if (program.reduce == Reduce::MAX_ABS) reduced = larger(reduced, v, member);
      if (program.divisor == Divisor::COUNT) divisor += masked(member, splat(1.0f));
      if (program.divisor == Divisor::WEIGHT) divisor += masked(member, weight);
    }
    if (program.divisor != Divisor::NONE)
      reduced = reduced / safe_divisor(divisor, divisor_floor, divisor_fill);
    F result = reduced * scale;
    if (base != nullptr) result = load<F>(base + j) + result;
    store(out + j, result);
  }
}

using ReduceBlock = void (*)(const Program&, const TensorScalars&, F zero, const Weights&,
                             const float* const*, int, const float*, std::int64_t, float*);

template <class Choice>
static ReduceBlock for_model_count(int n_models) {
  switch (n_models) {
    case 1: return reduce_block<Choice, 1>;
    case 2: return reduce_block<Choice, 2>;
    case 3: return reduce_block<Choice, 3>;
    case 4: return reduce_block<Choice, 4>;
    default: return reduce_block<Choice, 0>;
  }
}

// Only the stages after keep and rescale matter here.
inline constexpr Program kSum{};
inline constexpr Program kFusedSum{.reduce = Reduce::FUSED_SUM};
inline constexpr Program kFusedMean{.reduce = Reduce::FUSED_SUM, .divisor = Divisor::WEIGHT};
inline constexpr Program kTiesByWeight{.vote = Vote::MASS,
                                       .ballot = Ballot::WEIGHTED,
                                       .members = Members::STRICT,
                                       .divisor = Divisor::WEIGHT};
inline constexpr Program kActiveMean{.members = Members::STRICT, .divisor = Divisor::COUNT};
inline constexpr Program kTiesByCount{
    .vote = Vote::MASS, .members = Members::STRICT, .divisor = Divisor::COUNT};
// sd-mecha's election: zeros are members where nothing was elected.
inline constexpr Program kCountWithZeros{
    .vote = Vote::COUNT, .members = Members::ZERO_COUNTS, .divisor = Divisor::COUNT};
inline constexpr Program kMassWithZeros{
    .vote = Vote::MASS, .members = Members::ZERO_COUNTS, .divisor = Divisor::COUNT};

// The part of a program that acts after keep and rescale, with what it does not read set to the
// first choice. The zero sign is a scalar by then.
static Program after_keep(const Program& program) {
  Program p = program;
  p.keep = Keep::ALL;
  p.tie = Tie::GE;
  p.gain = Gain::MODEL;
  p.zero_sign = ZeroSign::PLUS;
  p.cross = Cross::NONE;
  if (p.vote == Vote::NONE) p.ballot = Ballot::RAW;
  return p;
}

static ReduceBlock choose_reduce(const Program& program, int n_models) {
  const Program p = after_keep(program);
  if (p == kSum) return for_model_count<Fixed<kSum>>(n_models);
  if (p == kActiveMean) return for_model_count<Fixed<kActiveMean>>(n_models);
  if (p == kTiesByWeight) return for_model_count<Fixed<kTiesByWeight>>(n_models);
  if (p == kTiesByCount) return for_model_count<Fixed<kTiesByCount>>(n_models);
  if (p == kCountWithZeros) return for_model_count<Fixed<kCountWithZeros>>(n_models);
  if (p == kMassWithZeros) return for_model_count<Fixed<kMassWithZeros>>(n_models);
  return reduce_block<AtRunTime, 0>;
}

template <DType dtype, bool streaming>
static void narrow_as(const float* result, void* out, std::int64_t begin, std::int64_t n) {
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    store_rounded<dtype, streaming>(out, begin + j, load<F>(result + j));
  if (j < n) store_partial<dtype>(out, begin + j, load<F>(result + j), static_cast<int>(n - j));
}

template <DType dtype>
static void narrow(const float* result, void* out, std::int64_t begin, std::int64_t n,
                   bool streaming) {
  const auto address =
      reinterpret_cast<std::uintptr_t>(out) + static_cast<std::uintptr_t>(begin) * size_of(dtype);
  if (streaming && address % (kLanes * size_of(dtype)) == 0) {
    narrow_as<dtype, true>(result, out, begin, n);
  } else {
    narrow_as<dtype, false>(result, out, begin, n);
  }
}

static void combine_staged(const TileCall& call, bool streaming) {
  const Entry& entry = call.entry;
  const int n_models = call.n_models();
  const ReduceBlock reduce = choose_reduce(call.program, n_models);
  std::vector<float> weights(n_models);
  for (int k = 0; k < n_models; ++k) weights[k] = call.models[k].weight;
  std::vector<const float*> taus(n_models);
  const F zero = zero_sign(call.program, call.tensor);
  for_each_block(call, [&](const BlockCall& block) {
    const float* base = stage_base(entry.base, block.begin, block.n, call.scratch);
    stage_kept(block, entry.task_vectors ? nullptr : base);
    for (int k = 0; k < n_models; ++k) taus[k] = block.tau(k);
    float* result = call.scratch.result.get(kMaxBlock + 64);
    reduce(call.program, call.tensor, zero, Weights{weights.data(), stage_shares(block)},
           taus.data(), n_models, base, block.n, result);
    switch (entry.out_dtype) {
      case DType::F32:
        narrow<DType::F32>(result, entry.out, block.begin, block.n, streaming);
        break;
      case DType::BF16:
        narrow<DType::BF16>(result, entry.out, block.begin, block.n, streaming);
        break;
      case DType::F16:
        narrow<DType::F16>(result, entry.out, block.begin, block.n, streaming);
        break;
    }
  });
}
