// Keys of a table: bits of the magnitudes that a keep stage ranks, every NaN as kNanKey.
#pragma once

#include <type_traits>

#include "../core/queries.hpp"
#include "tiles.cuh"

namespace tvfast::gpu {

inline constexpr std::uint32_t kInfinityKey = 0x7f800000u;

TVFAST_STAGE std::uint32_t key_of(F x) {
  const U key = bits(magnitude(x));
  return key < kNanKey ? key : kNanKey;
}

// Elements [i, i + n), n <= 4, of one model whose magnitudes are the keys; the rest is anything.
template <Keep keep>
TVFAST_STAGE void load_ranked(const DeviceEntry& entry, const DeviceModel* models, int n_models,
                              int model, std::int64_t i, int n, bool whole, F* x) {
  if constexpr (keep == Keep::SCORE) {
    load_scores(models[model].score, models[model].map, i, n, whole, x);
    return;
  }
  const bool subtracts = entry.subtracts;
  F base[kQuad] = {};
  if (subtracts) load_quad(entry.base, i, n, whole, base);
  const auto load_tau = [&](int k, F* tau) {
    load_quad(models[k].model, i, n, whole, tau);
    if (subtracts) {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) tau[e] = tau[e] - base[e];
    }
  };
  if constexpr (keep == Keep::BAND) {
    load_tau(model, x);
  } else {
    double sum[kQuad] = {}, spread[kQuad] = {};
    for (int k = 0; k < n_models; ++k) {
      load_tau(k, x);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) sum[e] += static_cast<double>(x[e]);
    }
#pragma unroll
    for (int e = 0; e < kQuad; ++e) sum[e] = sum[e] / n_models;
    for (int k = 0; k < n_models; ++k) {
      load_tau(k, x);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        const double apart = static_cast<double>(x[e]) - sum[e];
        spread[e] += apart * apart;
      }
    }
#pragma unroll
    for (int e = 0; e < kQuad; ++e) x[e] = static_cast<F>(spread[e] / n_models);
  }
}

// Calls fn(i, n, x) for the elements of a tile that this thread takes, n <= 4 at a time.
template <Keep keep, class Fn>
TVFAST_STAGE void for_each_ranked(const DeviceTable& table, const TileSpan& span, int model,
                                  Fn&& fn) {
  const DeviceEntry& entry = table.entries[span.entry];
  const DeviceModel* models = table.models + std::int64_t{span.entry} * table.n_models;
  const auto take = [&](std::int64_t i, int n, bool whole) {
    F x[kQuad];
    load_ranked<keep>(entry, models, table.n_models, model, i, n, whole, x);
    fn(i, n, x);
  };
  for_each_quad(entry, span, take);
  for_each_edge(span, take);
}

// Blocks of a kernel over all keys that share a multiprocessor: variances are sums of doubles,
// which need more registers.
constexpr int ranking_blocks(Keep keep) {
  return keep == Keep::VARIANCE ? kBlocksPerMultiprocessor / 2 : kBlocksPerMultiprocessor;
}

// Calls fn with a stage that ranks as a constant.
template <class Fn>
TVFAST_STAGE void with_keep(Keep keep, Fn&& fn) {
  if (keep == Keep::BAND) {
    fn(std::integral_constant<Keep, Keep::BAND>{});
  } else if (keep == Keep::SCORE) {
    fn(std::integral_constant<Keep, Keep::SCORE>{});
  } else {
    fn(std::integral_constant<Keep, Keep::VARIANCE>{});
  }
}

}  // namespace tvfast::gpu
