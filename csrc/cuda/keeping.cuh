// The keep stage of one model on the quad of elements that a thread holds.
#pragma once

#include "../core/tie_hash.hpp"
#include "lanes.cuh"

namespace tvfast::gpu {

// One quad of an entry: elements [i, i + n), n <= 4.
struct Quad {
  std::int64_t i;
  std::uint64_t index;  // global index of element i
  int n;
  bool whole;  // may be one load
};

// What the keep stage needs of a quad besides the task vector.
struct KeptBy {
  F variance[kQuad];
  F score[kQuad];  // crossed
  U ranks[kQuad];
};

// Draws of elements [index, index + 4).
TVFAST_STAGE void draw_quad(std::uint64_t key, std::uint64_t index, U* draws) {
  const auto block = [key](std::uint64_t number) {
    return philox(
        {static_cast<std::uint32_t>(number), static_cast<std::uint32_t>(number >> 32), 0u, 0u},
        static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32));
  };
  const auto low = block(index >> 2);
  const int shift = static_cast<int>(index & 3u);
  if (shift == 0) {
#pragma unroll
    for (int e = 0; e < kQuad; ++e) draws[e] = low[e];
    return;
  }
  const auto high = block((index >> 2) + 1);
#pragma unroll
  for (int e = 0; e < kQuad; ++e)
    draws[e] = shift == 1   ? (e < 3 ? low[(e + 1) & 3] : high[(e + 1) & 3])
               : shift == 2 ? (e < 2 ? low[(e + 2) & 3] : high[(e + 2) & 3])
                            : (e < 1 ? low[(e + 3) & 3] : high[(e + 3) & 3]);
}

TVFAST_STAGE U scaled_index(std::uint64_t index) {
  return static_cast<U>(index) * kMixIndex + static_cast<U>(index >> 32) * kMixHigh;
}

// lo <= a <= hi with the tie rule at both ends.
TVFAST_STAGE M banded(F a, const ModelScalars& s, Tie tie, std::uint64_t index) {
  if (tie == Tie::GE) return in_band(a, s.lo, s.hi);
  const std::uint64_t rank =
      tie == Tie::INDEX
          ? index
          : std::uint64_t{tie_hash(mixed_index(scaled_index(index)), hash_multiplier(s.key))};
  return in_band_ties(a, s.lo, s.hi, rank < s.lo_cut, rank < s.hi_cut);
}

// Population variance of d_1 ... d_K in float64, rounded once; load_tau(k, tau) gives d_k.
template <class LoadTau>
TVFAST_STAGE void variance_quad(int n_models, LoadTau&& load_tau, F* variance) {
  double sum[kQuad] = {}, spread[kQuad] = {};
  F tau[kQuad];
  for (int k = 0; k < n_models; ++k) {
    load_tau(k, tau);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) sum[e] += static_cast<double>(tau[e]);
  }
  for (int k = 0; k < n_models; ++k) {
    load_tau(k, tau);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      const double apart = static_cast<double>(tau[e]) - sum[e] / n_models;
      spread[e] += apart * apart;
    }
  }
#pragma unroll
  for (int e = 0; e < kQuad; ++e) variance[e] = static_cast<F>(spread[e] / n_models);
}

TVFAST_STAGE void load_scores(const DeviceModel& model, const Quad& quad, F* score) {
  load_scores(model.score, model.map, quad.i, quad.n, quad.whole, score);
}

// s_k of a quad, -1 where another model takes the place of model k's entry. The arrays are of all
// models.
TVFAST_STAGE void load_crossed(const Program& program, const ModelScalars* scalars,
                               const DeviceModel* models, int n_models, int k, const Quad& quad,
                               F* score) {
  load_scores(models[k], quad, score);
  if (program.cross == Cross::NONE) return;
#pragma unroll 1
  for (int j = 0; j < n_models; ++j) {
    if (j == k) continue;
    F other[kQuad];
    load_scores(models[j], quad, other);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      const M lost = program.cross == Cross::WINNER
                         ? other[e] >= score[e]
                         : banded(other[e], scalars[j], program.tie, quad.index + e);
      score[e] = unless_lost(score[e], lost);
    }
  }
}

// The models whose entry another model takes the place of, a bit for each; score[k][e] is s_k.
template <int kModels>
TVFAST_STAGE U lost_entries(const Program& program, const ModelScalars* scalars, int n_models,
                            std::uint64_t index, const F (*score)[kQuad], int e) {
  U lost = 0, inside = 0;
  if (program.cross == Cross::NONE) return lost;
#pragma unroll
  for (int k = 0; k < kModels; ++k) {
    if (k >= n_models) break;
    if (program.cross == Cross::EXCLUDE_OTHERS) {
      if (banded(score[k][e], scalars[k], program.tie, index)) inside |= 1u << k;
      continue;
    }
#pragma unroll
    for (int j = 0; j < kModels; ++j)
      if (j != k && j < n_models && score[j][e] >= score[k][e]) lost |= 1u << k;
  }
#pragma unroll
  for (int k = 0; k < kModels; ++k)
    if ((inside & ~(1u << k)) != 0) lost |= 1u << k;
  return lost;
}

TVFAST_STAGE void load_ranks(const DeviceModel& model, const Quad& quad, U* ranks) {
#pragma unroll
  for (int e = 0; e < kQuad; ++e) ranks[e] = e < quad.n ? model.ranks[quad.i + e] : 0u;
}

TVFAST_STAGE constexpr bool uses_ranks(Keep keep) {
  return keep == Keep::RANDOM_BY_RANK || keep == Keep::BAND_BY_RANK;
}

// kept_k of a quad.
TVFAST_STAGE void keep_quad(const Program& program, const ModelScalars& s, const DeviceModel& model,
                            const Quad& quad, const KeptBy& by, const F* tau, M* kept) {
  switch (program.keep) {
    case Keep::ALL: {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) kept[e] = true;
      return;
    }
    case Keep::BAND: {
#pragma unroll
      for (int e = 0; e < kQuad; ++e)
        kept[e] = banded(magnitude(tau[e]), s, program.tie, quad.index + e);
      break;
    }
    case Keep::SCORE: {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) kept[e] = banded(by.score[e], s, program.tie, quad.index + e);
      break;
    }
    case Keep::VARIANCE: {
#pragma unroll
      for (int e = 0; e < kQuad; ++e)
        kept[e] = banded(by.variance[e], s, program.tie, quad.index + e);
      break;
    }
    case Keep::RANDOM: {
      U draws[kQuad];
      draw_quad(s.key, quad.index, draws);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) kept[e] = draws[e] < s.limit;
      break;
    }
    case Keep::RANDOM_BY_RANK: {
      U draws[kQuad];
      draw_quad(s.key, quad.index, draws);
#pragma unroll
      for (int e = 0; e < kQuad; ++e)
        kept[e] = draws[e] < s.limit + ((by.ranks[e] * s.limit_step) >> 32);
      break;
    }
    case Keep::BAND_BY_RANK: {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) kept[e] = by.ranks[e] >= s.rank_lo && by.ranks[e] < s.rank_hi;
      break;
    }
    case Keep::MASK: {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        const std::int64_t i = quad.i + e;
        kept[e] = e < quad.n && (__ldg(model.mask + (i >> 6)) >> (i & 63) & 1u) != 0;
      }
      break;
    }
  }
#pragma unroll
  for (int e = 0; e < kQuad; ++e) kept[e] = kept[e] | is_nan(tau[e]);
}

// t_k from kept entries.
TVFAST_STAGE F rescale(const Program& program, const ModelScalars& s, U rank, F kept) {
  if (program.gain == Gain::MODEL) return kept * s.gain;
  if (!uses_ranks(program.keep)) return kept / s.prob;
  return kept / (s.prob + static_cast<F>(rank) * s.prob_step);
}

// What the weights of an element's entries depend on besides their model, once t_k has joined
// t_1 ... t_(k-1): how many models have an entry, or how much of the second replaces the first.
TVFAST_STAGE F add_relation(const Program& program, F relation, int k, F t, F weight, F floor) {
  switch (program.weighting) {
    case Weighting::MODEL:
    case Weighting::SCORE: return relation;
    case Weighting::NEARNESS: return k == 0 ? t : nearness(relation, t, weight, floor);
    case Weighting::ALONE: return relation + masked(not_zero(t), 1.0f);
  }
  return relation;
}

// Whether weights depend on the entries of all models.
TVFAST_STAGE constexpr bool uses_relation(Weighting weighting) {
  return weighting == Weighting::NEARNESS || weighting == Weighting::ALONE;
}

// w_k of an element; `score` is s_k where scores weigh.
TVFAST_STAGE F weight_of(const Program& program, F relation, int k, F weight, F score) {
  switch (program.weighting) {
    case Weighting::MODEL: return weight;
    case Weighting::SCORE: return weight * score;
    case Weighting::NEARNESS: return k == 0 ? 1.0f - relation : relation;
    case Weighting::ALONE: return weight_alone(relation, weight);
  }
  return weight;
}

// w_k of a quad; `scores`: they may weigh.
template <bool scores = true>
TVFAST_STAGE void load_weights(const Program& program, const F* relations, int k,
                               const ModelScalars& s, const DeviceModel& model, const Quad& quad,
                               F* weight) {
  F score[kQuad] = {};
  if (scores && program.weighting == Weighting::SCORE) load_scores(model, quad, score);
#pragma unroll
  for (int e = 0; e < kQuad; ++e)
    weight[e] = weight_of(program, relations[e], k, s.weight, score[e]);
}

TVFAST_STAGE F cast_ballot(const Program& program, F t, F weight) {
  return program.ballot == Ballot::WEIGHTED ? t * weight : t;
}

TVFAST_STAGE F add_vote(const Program& program, F votes, F t, F weight) {
  const F ballot = cast_ballot(program, t, weight);
  return votes + (program.vote == Vote::MASS ? ballot : sign_of(ballot));
}

}  // namespace tvfast::gpu
