// What bindings may call: the two verbs over a work table, and exact thresholds.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "table.hpp"

namespace tvfast {

struct Options {
  std::string isa;        // empty: the best, or TVFAST_ISA
  int n_threads = 0;      // <= 0: every core the process may use
  std::int64_t tile = 0;  // elements a thread takes at a time; <= 0: chosen here
};

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

// Writes every entry's `out`, which may be its base or one of its models.
void combine(const Table& table, const Program& program, const Scalars& scalars,
             const Options& options);

// One Moments per entry, with the fields of `wants` filled.
std::vector<Moments> measure(const Table& table, const Program& program, const Scalars& scalars,
                             unsigned wants, const Options& options);

// Sets the bit planes to the keep stage's answers.
void row_masks(const Table& table, const Program& program, const Scalars& scalars,
               const Options& options);

// The k-th largest key of each query: n_greater < k <= n_greater + n_equal.
std::vector<Threshold> thresholds(const Table& table, Keep keep,
                                  const std::vector<RankQuery>& queries, const Options& options);

struct CountQuery {
  int group, model;
  std::uint32_t key;
};

// How many magnitudes of task vectors are above each key, and equal to it: the check of a guessed
// or remembered threshold.
std::vector<Threshold> verify(const Table& table, const std::vector<CountQuery>& queries,
                              const Options& options);

// Position within the group of the r-th entry that equals the key; -1 if there are not so many.
std::vector<std::int64_t> nth_equal(const Table& table, Keep keep,
                                    const std::vector<EqualQuery>& queries, const Options& options);

// Instruction sets that this build holds and this processor can run, best first; and the one that
// runs by default.
std::vector<std::string> isas();
std::string default_isa();

// Cores this process may run on.
int available_threads();

}  // namespace tvfast
