// The merge algebra as plain data. Twin of tvfast/program.py: same names, same values, a test
// compares them.
#pragma once

#include <cstdint>
#include <limits>

#include "dtype.hpp"

namespace tvfast {

enum class Keep : std::uint8_t {
  ALL = 0,
  BAND = 1,            // lo <= |tau| <= hi, ties at the ends by Tie
  SCORE = 2,           // the same test on |score|
  VARIANCE = 3,        // the same test on the population variance of tau across models
  RANDOM = 4,          // Bernoulli(prob)
  RANDOM_BY_RANK = 5,  // Bernoulli(p(rank of |tau| within its row))
  BAND_BY_RANK = 6,    // rank_lo <= rank < rank_hi
  MASK = 7,            // bit plane per model
};
enum class Tie : std::uint8_t { GE = 0, INDEX = 1, HASH = 2 };
enum class Cross : std::uint8_t { NONE = 0, WINNER = 1, EXCLUDE_OTHERS = 2 };
enum class Weighting : std::uint8_t { MODEL = 0, SCORE = 1, NEARNESS = 2, ALONE = 3 };
enum class Gain : std::uint8_t { MODEL = 0, INVERSE_PROBABILITY = 1 };
enum class Vote : std::uint8_t { NONE = 0, MASS = 1, COUNT = 2 };
enum class Ballot : std::uint8_t { RAW = 0, WEIGHTED = 1 };
enum class ZeroSign : std::uint8_t { PLUS = 0, MINUS = 1, NONE = 2, MAJORITY = 3 };
enum class Members : std::uint8_t { STRICT = 0, ZERO_COUNTS = 1 };
enum class Reduce : std::uint8_t { SUM = 0, MAX_ABS = 1, FUSED_SUM = 2 };
enum class Divisor : std::uint8_t { NONE = 0, COUNT = 1, WEIGHT = 2 };

struct Program {
  Keep keep = Keep::ALL;
  Tie tie = Tie::GE;
  Gain gain = Gain::MODEL;
  Vote vote = Vote::NONE;
  Ballot ballot = Ballot::RAW;
  ZeroSign zero_sign = ZeroSign::PLUS;
  Members members = Members::ZERO_COUNTS;
  Reduce reduce = Reduce::SUM;
  Divisor divisor = Divisor::NONE;
  Cross cross = Cross::NONE;
  Weighting weighting = Weighting::MODEL;

  friend constexpr bool operator==(const Program&, const Program&) = default;
};

constexpr std::uint64_t kOpenCut = std::numeric_limits<std::uint64_t>::max();
constexpr std::uint64_t kAlways = std::uint64_t{1} << 32;

struct ModelScalars {
  float weight = 1.0f;
  float gain = 1.0f;
  float lo = 0.0f;
  float hi = std::numeric_limits<float>::infinity();
  std::uint64_t lo_cut = kOpenCut;
  std::uint64_t hi_cut = 0;
  std::uint64_t limit = kAlways;
  std::uint64_t limit_step = 0;
  float prob = 1.0f;
  float prob_step = 0.0f;
  std::int64_t rank_lo = 0;
  std::int64_t rank_hi = std::numeric_limits<std::int64_t>::max();
  std::uint64_t key = 0;
};

struct TensorScalars {
  float scale = 1.0f;
  float majority = 1.0f;
  float divisor_floor = std::numeric_limits<float>::denorm_min();
  float divisor_fill = 1.0f;
};

// How a stored score is read: max(score * scale + shift, floor).
struct ScoreMap {
  float scale = 1.0f;
  float shift = 0.0f;
  float floor = 0.0f;
};

// Contiguous elements; need not be aligned beyond their own size.
struct View {
  const void* data = nullptr;
  DType dtype = DType::F32;
};

}  // namespace tvfast
