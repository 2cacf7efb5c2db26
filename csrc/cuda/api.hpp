// What bindings may call: the verbs of cpu/api.hpp over a table in device memory. Nothing here
// allocates device memory or waits for the device; workspace and stream are the caller's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../core/factored.hpp"
#include "../core/moments.hpp"
#include "../core/queries.hpp"
#include "../core/table.hpp"
#include "device_table.hpp"
#include "equal_plan.hpp"
#include "place.hpp"
#include "select_plan.hpp"

namespace tvfast::gpu {

// What of a band has to be tested: of a launch's scalars, which the host knows.
enum class Ends : std::int32_t { LOWER = 0, BOTH = 1 };
Ends ends_of(const Scalars& scalars);

// Words in device memory that a launch asks for leave; without them it runs.
struct Gate {
  const std::uint32_t* flag = nullptr;  // nothing is done unless it is set, or is not
  bool set = true;
  const std::uint32_t* any = nullptr;   // nothing is done unless it is set
  const std::uint32_t* left = nullptr;  // of each entry: those set are merged, or the others
  bool merges_left = true;
};

// Where a merge with guesses counts.
struct Trial {
  const std::int32_t* row_queries = nullptr;  // of each model of each entry, or -1
  Guess* guesses = nullptr;
};

// Writes every entry's `out`, which may be its base or one of its models.
void combine(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
             Ends ends, Place place, Gate gate = {});

// Bytes that `measure` needs, which the caller copies to the host and gives to `moments`.
std::size_t measure_workspace(std::int64_t n_entries, int n_models);

// Gathers the statistics that `wants` names; those of all entries in one launch for up to 64 sums.
void measure(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
             unsigned wants, void* workspace, Place place);

// One Moments per entry from the bytes that `measure` left.
std::vector<Moments> moments(const std::vector<unsigned char>& workspace, std::int64_t n_entries,
                             int n_models);

// Sets the bit planes to the keep stage's answers, and the bits past the end to zero.
void row_masks(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
               Place place);

// Workspace of `rank_rows`: at most this, or what one row and model need.
inline constexpr std::int64_t kRankBytes = std::int64_t{256} << 20;

// Rows of at most 2^31 - 1 elements.
struct RankPlan {
  std::vector<std::byte> first_rows;  // [n_entries + 1] as the kernel reads them
  std::int64_t longest = 0, n_blocks = 0;
  std::size_t n_workspace = 0;

  const std::vector<std::byte>& bytes() const { return first_rows; }
};
RankPlan rank_plan(const Table& table, Place place);

// Writes the ranks of |d_k| within rows, equals by index, where the table's models say; `at` is
// where the plan's bytes are in device memory.
void rank_rows(const DeviceTable& table, const RankPlan& plan, const void* at, void* workspace,
               Place place);

// Adds |score_k * tau_k| * weight_k, models in order, to every entry's `out`, which is float32.
void score(const DeviceTable& table, const DeviceScalars& scalars, Place place);

// Adds the scores of per-sample gradients in factored form; a gradient is never in memory as a
// whole.
std::size_t score_factored_workspace(const FactoredScore& score);
void score_factored(const FactoredScore& score, void* workspace, Place place);

// Memory of one dot product in the order-independent accumulator, zero before the first addend; the
// caller copies it to the host and gives it to `dot_value`.
inline constexpr std::size_t kDotBytes = 544;
double dot_value(const void* host_copy);

// P = B X A for block-diagonal A and B of at most kLargestBlock, reading X once from device memory;
// <X, P> is added to `dot`.
std::size_t kron_workspace(const KroneckerProduct& product, Place place);
void kron(const KroneckerProduct& product, void* workspace, void* dot, Place place);

// Writes a panel of a product that was multiplied elsewhere and adds its <X, P> to `dot`.
void finish_product(const ProductPanel& panel, void* dot, Place place);

// Exact k-th largest keys; answers stay in the workspace, of queries.layout().total bytes. `at` is
// where the queries' bytes are in device memory.
void thresholds(const DeviceTable& table, const PackedQueries& queries, const void* at,
                void* workspace, Place place);

// Its two halves: samples and brackets, with guesses if they are asked for; and what brackets hold.
void bracket(const DeviceTable& table, const PackedQueries& queries, const void* at,
             void* workspace, bool guesses, Place place);
void search(const DeviceTable& table, const PackedQueries& queries, const void* at, void* workspace,
            Place place);

// In between: closes the queries whose guesses a merge has proved right.
void settle(const PackedQueries& queries, const void* at, void* workspace, Place place);

// Counts what is above each query's key, and what equals it.
void verify(const DeviceTable& table, const PackedQueries& queries, const void* at, void* workspace,
            Place place);

// Writes the bands from each query's answer on into the scalars of its group's entries, on the
// device: lo, and the cut that gives ties at lo so many places that exactly k keys are kept, by
// hash or, with the queries' places among equals, by index. Sets the verdicts: whether a band holds
// NaN only, or a share of the infinities, which kernels that test the lower end alone cannot tell;
// and, of entries that were merged with guesses, whether one was wrong.
struct EqualPlaces {
  const PackedEquals* queries = nullptr;  // of equals_of(queries)
  void *at = nullptr, *workspace = nullptr;
};
void place_thresholds(const DeviceTable& table, const PackedQueries& queries, const void* at,
                      void* workspace, EqualPlaces equals, bool guesses, Tie tie,
                      const DeviceScalars& scalars, Place place);
PackedEquals equals_of(const Table& table, const PackedQueries& queries);

// The merge with those bands, of the entries that are `left` or, without them, of all.
void combine_placed(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
                    Ends ends, const Verdicts& found, const std::uint32_t* left, Place place);

// Whether there is a kernel that merges with guesses and counts what proves them. Inputs must
// outlive that merge: no output may be one.
bool can_guess(const Program& program, Ends ends, int n_models);
bool overwrites_inputs(const Table& table);

// Writes the bands of the guesses, and merges the entries that have them.
void place_guesses(const DeviceTable& table, const PackedQueries& queries, const void* at,
                   void* workspace, const DeviceScalars& scalars, Place place);
void combine_guessed(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
                     const Verdicts& found, const std::uint32_t* left, Trial trial, Place place);

// All of a trimmed merge, of a number of launches that the host knows.
void combine_trimmed(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
                     Ends ends, const PackedQueries& queries, const void* at, void* workspace,
                     EqualPlaces equals, bool guesses, Place place);

// What `thresholds` or `verify` left in the workspace, in the order in which they were asked. These
// wait for the device.
std::vector<Threshold> read_thresholds(const PackedQueries& queries, void* workspace, Place place);
std::vector<Threshold> read_counts(const PackedQueries& queries, void* workspace, Place place);

// How each entry of the last trimmed merge with guesses was merged.
std::vector<Outcome> read_outcomes(const PackedQueries& queries, void* workspace, Place place);

// Keys that equal each query's, of every entry; and where the r-th of them is in its group.
void count_equal(const DeviceTable& table, const PackedEquals& queries, const void* at,
                 void* workspace, Place place);
void nth_equal(const DeviceTable& table, const PackedEquals& queries, const void* at,
               void* workspace, Place place);
std::vector<std::int64_t> read_equals(const PackedEquals& queries, void* workspace, Place place);
std::vector<EqualAnswer> read_positions(const PackedEquals& queries, void* workspace, Place place);

}  // namespace tvfast::gpu
