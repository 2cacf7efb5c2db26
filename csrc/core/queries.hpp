// Questions about the keys of a work table, their answers, and the scalars of a call.
#pragma once

#include <cstdint>
#include <vector>

#include "program.hpp"

namespace tvfast {

// Bits of a magnitude, in which every NaN is this one.
inline constexpr std::uint32_t kNanKey = 0x7f800001u;

// Scalars of every entry, and of every model of every entry: models[entry * n_models + model].
struct Scalars {
  std::vector<TensorScalars> tensors;
  std::vector<ModelScalars> models;
};

struct RankQuery {
  int group, model;
  std::int64_t k;  // 1-based, by descending magnitude
};

struct Threshold {
  std::uint32_t key;  // bits of the magnitude
  std::int64_t n_greater, n_equal;
};

struct EqualQuery {
  int group, model;
  std::uint32_t key;
  std::int64_t r;  // 0-based
};

struct CountQuery {
  int group, model;
  std::uint32_t key;
};

struct PartitionQuery {
  int group, model;
  std::vector<std::uint32_t> edges;  // ascending, at least one
};

}  // namespace tvfast
