// How the quad of elements that a thread holds of every tensor becomes one of the result.
#pragma once

#include "reducing.cuh"
#include "tally.cuh"
#include "tile_scalars.cuh"

namespace tvfast::gpu {

constexpr bool reads_scores(const Program& program) {
  return program.keep == Keep::SCORE || program.weighting == Weighting::SCORE;
}

// How a quad is merged. Fixed programs become constants in the kernel; every other one runs the
// same text on a program read at run time, with every model's scores in registers if it reads them.
template <Program fixed, Ends tested>
struct Fixed {
  static_assert(tested == Ends::BOTH ||
                (fixed.cross == Cross::NONE && fixed.weighting == Weighting::MODEL));
  static constexpr Ends kEnds = tested;
  static constexpr bool kAtRunTime = false, kScores = reads_scores(fixed), kCounts = false;
  static __device__ constexpr Program get(const Program&) { return fixed; }
};
template <bool with_scores>
struct AtRunTime {
  static constexpr Ends kEnds = Ends::BOTH;
  static constexpr bool kAtRunTime = true, kScores = with_scores, kCounts = false;
  static __device__ const Program& get(const Program& program) { return program; }
};

// A fixed program that also counts what its lower ends cut: they are guesses.
template <Program fixed>
struct Guessed : Fixed<fixed, Ends::LOWER> {
  static constexpr bool kCounts = true;
};

// What a kernel knows of the entry that it merges.
template <int kModels>
struct Merge {
  const Program& program;
  const TileScalars<kModels>& scalars;
  const ModelScalars* all_scalars;  // [n_models] in device memory
  const DeviceEntry& entry;
  const DeviceModel* models;
  int n_models;
  Tally& tally;
};

// t_k of a quad from d_k.
TVFAST_STAGE void keep_and_rescale(const Program& program, const ModelScalars& s,
                                   const DeviceModel& model, const Quad& quad, KeptBy& by, F* tau) {
  if (uses_ranks(program.keep)) load_ranks(model, quad, by.ranks);
  M kept[kQuad];
  keep_quad(program, s, model, quad, by, tau, kept);
#pragma unroll
  for (int e = 0; e < kQuad; ++e)
    tau[e] =
        rescale(program, s, uses_ranks(program.keep) ? by.ranks[e] : 0u, masked(kept[e], tau[e]));
}

// Merges one quad; load(k, x) gives model k's elements, load(-1, x) the base's. The entries of at
// most kModels models stay in registers.
template <class Choice, int kModels, bool exact, class Load>
TVFAST_STAGE void merge_quad(const Merge<kModels>& merge, const Quad& quad, Load&& load,
                             F* result) {
  const Program program = Choice::get(merge.program);
  const int n_models = exact ? kModels : merge.n_models;
  const bool has_base = merge.entry.base.data != nullptr;
  const F zero = zero_sign(program, merge.scalars.tensor);
  F base[kQuad] = {};
  if (has_base) load(-1, base);
  F t[kModels][kQuad];
#pragma unroll
  for (int k = 0; k < kModels; ++k) {
    if (k >= n_models) break;
    load(k, t[k]);
    if (merge.entry.subtracts) {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) t[k][e] = t[k][e] - base[e];
    }
  }
  constexpr bool kHeld = Choice::kScores && Choice::kEnds == Ends::BOTH;
  F score[kHeld ? kModels : 1][kQuad];
  U lost[kQuad] = {};
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kModels; ++k)
      if (k < n_models) load_scores(merge.models[k], quad, score[k]);
#pragma unroll
    for (int e = 0; e < kQuad; ++e)
      lost[e] =
          lost_entries<kModels>(program, merge.scalars.models, n_models, quad.index + e, score, e);
  }
  KeptBy by;
  if (program.keep == Keep::VARIANCE) {
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      double sum = 0.0, spread = 0.0;
#pragma unroll
      for (int k = 0; k < kModels; ++k)
        if (k < n_models) sum += static_cast<double>(t[k][e]);
      const double mean = sum / n_models;
#pragma unroll
      for (int k = 0; k < kModels; ++k) {
        const double apart = static_cast<double>(t[k][e]) - mean;
        if (k < n_models) spread += apart * apart;
      }
      by.variance[e] = static_cast<F>(spread / n_models);
    }
  }
  if constexpr (Choice::kEnds == Ends::BOTH) {
#pragma unroll
    for (int k = 0; k < kModels; ++k) {
      if (k >= n_models) break;
      if constexpr (kHeld) {
#pragma unroll
        for (int e = 0; e < kQuad; ++e)
          by.score[e] = unless_lost(score[k][e], (lost[e] >> k & 1u) != 0);
      }
      keep_and_rescale(program, merge.scalars.models[k], merge.models[k], quad, by, t[k]);
    }
  }
  if constexpr (Choice::kEnds == Ends::LOWER && Choice::kScores) {
#pragma unroll
    for (int k = 0; k < kModels; ++k) {
      if (k >= n_models) break;
      load_scores(merge.models[k], quad, by.score);
#pragma unroll
      for (int e = 0; e < kQuad; ++e)
        t[k][e] = keep_from_end(program, merge.scalars.ends[k], mixed_for(program, quad, e),
                                by.score[e], t[k][e]) *
                  merge.scalars.models[k].gain;
    }
  }
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    if constexpr (Choice::kEnds == Ends::LOWER && !Choice::kScores) {
      const U mixed = mixed_for(program, quad, e);
#pragma unroll
      for (int k = 0; k < kModels; ++k)
        if (k < n_models) {
          if (Choice::kCounts && e < quad.n)
            merge.tally.count(k, t[k][e], merge.scalars.ends[k].lo);
          t[k][e] =
              keep_from_end(program, merge.scalars.ends[k], mixed, magnitude(t[k][e]), t[k][e]) *
              merge.scalars.models[k].gain;
        }
    }
    F relation = 0.0f;
    if (uses_relation(program.weighting)) {
#pragma unroll
      for (int k = 0; k < kModels; ++k)
        if (k < n_models)
          relation = add_relation(program, relation, k, t[k][e], merge.scalars.models[k].weight,
                                  merge.scalars.tensor.divisor_floor);
    }
    const auto weight = [&](int k) {
      F own_score = 1.0f;
      if constexpr (kHeld) own_score = score[k][e];
      return weight_of(program, relation, k, merge.scalars.models[k].weight, own_score);
    };
    F sign = zero;
    if (program.vote != Vote::NONE) {
      F votes = 0.0f;
#pragma unroll
      for (int k = 0; k < kModels; ++k)
        if (k < n_models) votes = add_vote(program, votes, t[k][e], weight(k));
      sign = elected(votes, zero);
    }
    Reduced reduced = nothing(program);
#pragma unroll
    for (int k = 0; k < kModels; ++k)
      if (k < n_models) join(program, reduced, t[k][e], weight(k), sign);
    result[e] = finish(program, merge.scalars.tensor, reduced, has_base, base[e]);
  }
}

// The same for any number of models, whose entries are read again where they are needed again.
template <class Choice, class Load>
TVFAST_STAGE void merge_quad_of_many(const Merge<0>& merge, const Quad& quad, Load&& load,
                                     F* result) {
  const Program& program = merge.program;
  const bool has_base = merge.entry.base.data != nullptr;
  const F zero = zero_sign(program, merge.scalars.tensor);
  F base[kQuad] = {};
  if (has_base) load(-1, base);
  const auto load_tau = [&](int k, F* tau) {
    load(k, tau);
    if (merge.entry.subtracts) {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) tau[e] = tau[e] - base[e];
    }
  };
  KeptBy by;
  if (program.keep == Keep::VARIANCE) variance_quad(merge.n_models, load_tau, by.variance);
  const auto load_kept = [&](int k, F* t) {
    load_tau(k, t);
    if constexpr (Choice::kScores) {
      if (program.keep == Keep::SCORE)
        load_crossed(program, merge.all_scalars, merge.models, merge.n_models, k, quad, by.score);
    }
    keep_and_rescale(program, merge.all_scalars[k], merge.models[k], quad, by, t);
  };
  F sign[kQuad] = {zero, zero, zero, zero}, t[kQuad], relations[kQuad] = {};
  if (uses_relation(program.weighting)) {
    for (int k = 0; k < merge.n_models; ++k) {
      load_kept(k, t);
#pragma unroll
      for (int e = 0; e < kQuad; ++e)
        relations[e] = add_relation(program, relations[e], k, t[e], merge.all_scalars[k].weight,
                                    merge.scalars.tensor.divisor_floor);
    }
  }
  const auto load_weight = [&](int k, F* weight) {
    load_weights<Choice::kScores>(program, relations, k, merge.all_scalars[k], merge.models[k],
                                  quad, weight);
  };
  F weight[kQuad];
  if (program.vote != Vote::NONE) {
    F votes[kQuad] = {};
    for (int k = 0; k < merge.n_models; ++k) {
      load_kept(k, t);
      load_weight(k, weight);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) votes[e] = add_vote(program, votes[e], t[e], weight[e]);
    }
#pragma unroll
    for (int e = 0; e < kQuad; ++e) sign[e] = elected(votes[e], zero);
  }
  Reduced reduced[kQuad];
#pragma unroll
  for (int e = 0; e < kQuad; ++e) reduced[e] = nothing(program);
  for (int k = 0; k < merge.n_models; ++k) {
    load_kept(k, t);
    load_weight(k, weight);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) join(program, reduced[e], t[e], weight[e], sign[e]);
  }
#pragma unroll
  for (int e = 0; e < kQuad; ++e)
    result[e] = finish(program, merge.scalars.tensor, reduced[e], has_base, base[e]);
}

template <class Choice, int kModels, bool exact, class Load>
TVFAST_STAGE void merge_any(const Merge<kModels>& merge, const Quad& quad, Load&& load, F* result) {
  if constexpr (kModels == 0) {
    merge_quad_of_many<Choice>(merge, quad, load, result);
  } else {
    merge_quad<Choice, kModels, exact>(merge, quad, load, result);
  }
}

}  // namespace tvfast::gpu
