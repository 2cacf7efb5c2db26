// Ranks within rows that are too long to be held with their ranks: a segment of a row at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "key_passes.hpp"

namespace tvfast {

// Ranks of consecutive entries of one row, of every model. A segment's keys are sorted and made
// distinct; every other key of the row then only adds one to the count of the distinct key that it
// is not above, from which the prefix sums give the ranks. That reads the row once for every
// segment, in constant memory.
class SegmentRanks {
 public:
  // Memory for segments of at most `length` entries; about so many bytes for each of them:
  static std::int64_t bytes_per_entry(int n_models, int n_threads) {
    return 2 * sizeof(std::uint64_t) + sizeof(std::uint32_t) * (1 + n_models + n_threads);
  }
  SegmentRanks(const Table& table, const Options& options, int n_threads, std::int64_t length);

  // Ranks entries [begin, end) within the row [row_begin, row_end) of an entry of the table.
  void rank(const Entry& entry, std::int64_t row_begin, std::int64_t row_end, std::int64_t begin,
            std::int64_t end);

  // Valid until the next call of `rank`.
  const RowRanks& ranks() const { return ranks_; }

 private:
  void rank_model(const Entry& entry, int model, std::int64_t row_begin, std::int64_t row_end,
                  std::uint32_t* ranks);
  void sort_segment(const Entry& entry, int model);
  void index_distinct();
  void count(const Entry& entry, int model, std::int64_t begin, std::int64_t end, int thread);

  KeyPasses passes_;
  int n_threads_;
  std::int64_t begin_ = 0, end_ = 0;           // of the segment
  std::vector<std::uint64_t> sorted_, spare_;  // (key, index), which orders as one number
  std::vector<std::uint32_t> distinct_;
  // Where the distinct keys of each bin begin; a bin is some leading bits of a key.
  std::vector<std::uint32_t> first_of_bin_;
  std::uint32_t n_bins_ = 0, lowest_bin_ = 0;
  int shift_ = 0;
  std::vector<std::vector<std::uint32_t>> counts_;  // [thread][distinct key, one more]
  std::vector<Scratch> scratch_;                    // [thread]
  std::vector<std::uint32_t> data_;
  RowRanks ranks_;
};

}  // namespace tvfast
