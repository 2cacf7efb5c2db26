// Exact selection on a device: the queries of one call as its kernels read them, and where they
// work. Host only and pure; select.cu gives the method.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../core/queries.hpp"
#include "../core/table.hpp"

namespace tvfast::gpu {

using Count = unsigned long long;  // what CUDA's atomics take

inline constexpr int kDigitBits = 11;
inline constexpr int kDigits = 1 << kDigitBits;
inline constexpr int kRadixPasses = 3;  // of 31-bit keys
inline constexpr int kSampleLine = 16;  // consecutive elements of one sample

// Half-width of a bracket in standard deviations of an independent sample; elements of a line are
// correlated.
inline constexpr double kSampleWidth = 3.0;

// How far a rank of the sample must lie inside a run of equal keys for them to be a guess. A wrong
// one costs a merge: with three models at this distance, correlated lines included, about two of
// three merges are right, and most ranks lie further inside (docs/adr/0013).
inline constexpr double kGuessWidth = 1.5;

// What a selection may take. Results do not depend on it.
struct SelectionLimits {
  std::int64_t small_group = 16384;  // groups up to this size are selected from all their keys
  std::int64_t n_keys = std::int64_t{32} << 20;  // collected, of all queries of a batch together
  std::int64_t n_queries = 2048;                 // of a batch: 16 KiB of counters each
};

struct DeviceQuery {
  std::int64_t k, n;  // 1-based rank by descending magnitude, keys of the group
  std::int64_t sample_at, keys_at;
  std::int32_t n_sample, n_lines;  // n_lines == 0: the sample is the whole group
  std::int32_t n_keys;             // room for collected ones
  std::int32_t group, model;
  std::uint32_t key;    // asked for, where no rank is
  std::int32_t place;   // in the caller's list, and of its state
  std::int32_t unused;  // no padding: the bytes are copied
};

// What is known of a query: its answer is one of the keys [lo, hi], with `n_over` keys above hi.
struct QueryState {
  std::uint32_t lo, hi;
  std::uint32_t open, unused;
  Count n_over;
  // Of one pass: keys above hi, from hi on, from lo on, strictly inside, and those collected.
  Count above_hi, from_hi, from_lo, inside, n_collected;
  Count n_greater, n_equal;  // of the key lo == hi, when closed
};

// What a sample says of a query before anything is counted, and what a merge with it counted.
struct Guess {
  std::uint32_t key;
  std::uint32_t likely;     // enough for a merge to be tried with it
  Count n_greater, n_from;  // keys above it, and from it on
};

// How an entry of a trimmed merge was merged: with guesses that were right; with answers, for want
// of guesses; or with both, because a guess was wrong.
enum class Outcome : std::uint32_t { PROVED = 0, UNGUESSED = 1, WRONG = 2 };

// What a trimmed merge found out on its way.
struct Verdicts {
  // Whether a band holds NaN only, or some of the infinities: the lower end alone cannot tell them.
  std::uint32_t both_ends;
  std::uint32_t tried, left;  // whether entries are merged with guesses, and with answers
  std::uint32_t unused;
};

// An entry of a group, by position; how many keys and tiles of the group come before it.
struct GroupMember {
  std::int64_t start, first_tile;
  std::int32_t entry, unused;
};

// Queries that share the workspace: their range, the tiles of their groups, the sample's size.
struct SelectionBatch {
  std::int32_t first, last;
  std::int64_t first_tile, end_tile, n_sample;
};

// Places in the workspace, in bytes.
struct SelectionLayout {
  std::size_t states = 0, flags = 0, verdicts = 0, guesses = 0;
  std::size_t left = 0;  // [n_entries] Outcome: but for the first, still to be merged
  // [n_entries][n_models] place of the query that a guess answers, or -1
  std::size_t row_queries = 0;
  std::size_t bins = 0, samples = 0, keys = 0, total = 0;
};

// Queries of a call by group, packed into one piece of memory that is copied to the device.
class PackedQueries {
 public:
  PackedQueries(const Table& table, Keep keep, const std::vector<RankQuery>& queries,
                const SelectionLimits& limits = {});
  // For counting what is above each key and equal to it.
  PackedQueries(const Table& table, Keep keep, const std::vector<CountQuery>& queries);

  const std::vector<std::byte>& bytes() const { return bytes_; }
  Keep keep() const { return keep_; }
  const std::vector<DeviceQuery>& queries() const { return queries_; }  // by group and model
  std::int64_t n_entries() const { return n_entries_; }
  std::int32_t n_queries() const { return static_cast<std::int32_t>(queries_.size()); }
  const std::vector<SelectionBatch>& batches() const { return batches_; }
  const SelectionLayout& layout() const { return layout_; }
  std::size_t members_at() const { return members_at_; }
  std::size_t first_queries_at() const { return first_queries_at_; }
  std::size_t first_members_at() const { return first_members_at_; }

 private:
  void pack(const Table& table, const SelectionLimits& limits);

  Keep keep_;
  std::int64_t n_entries_ = 0;
  std::vector<DeviceQuery> queries_;
  std::vector<SelectionBatch> batches_;
  SelectionLayout layout_;
  std::vector<std::byte> bytes_;
  std::size_t members_at_ = 0, first_queries_at_ = 0, first_members_at_ = 0;
};

// Elements sampled of a group of n, in lines; where sampling one and going through the candidates
// that it saves take equally long.
std::int64_t n_sample_lines(std::int64_t n);

// Room for the keys that a bracket of n holds at the median, where it is widest, with as much to
// spare.
std::int64_t n_candidates(std::int64_t n, const SelectionLimits& limits);

// Entries of each group by position.
struct GroupMembers {
  std::vector<std::int32_t> first;  // [n_groups + 1]
  std::vector<GroupMember> members;
  std::vector<std::int64_t> n_keys, n_tiles;  // [n_groups]
};
GroupMembers members_of(const Table& table, int n_groups);

}  // namespace tvfast::gpu
