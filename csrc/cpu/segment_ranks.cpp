#include "segment_ranks.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "parallel.hpp"

namespace tvfast {

namespace {

// Keys that a thread takes at a time.
constexpr std::int64_t kChunk = 65536;

// Bins of the distinct keys: 8 octaves below the largest, as many bins as keys, at most 4 MiB.
constexpr int kOctaveBits = 26, kFewestBinBits = 6, kMostBinBits = 20;

constexpr int kDigitBits = 11, kKeyBits = 31;

std::uint32_t key_of(std::uint64_t pair) { return static_cast<std::uint32_t>(pair >> 32); }

// How many of `n` ascending keys are below one; std::lower_bound would branch on what is not known
// in advance.
std::uint32_t first_not_below(const std::uint32_t* keys, std::uint32_t n, std::uint32_t key) {
  std::uint32_t first = 0;
  while (n > 0) {
    const std::uint32_t half = n / 2;
    const bool below = keys[first + half] < key;
    first = below ? first + half + 1 : first;
    n = below ? n - half - 1 : half;
  }
  return first;
}

// Stable, by the keys alone. What is in `spare` afterwards has no meaning.
void sort_by_key(std::vector<std::uint64_t>& pairs, std::vector<std::uint64_t>& spare) {
  constexpr std::uint32_t kDigits = 1u << kDigitBits;
  spare.resize(pairs.size());
  for (int shift = 0; shift < kKeyBits; shift += kDigitBits) {
    const auto digit = [=](std::uint64_t pair) { return (key_of(pair) >> shift) % kDigits; };
    std::array<std::uint32_t, kDigits> begin{};
    for (const std::uint64_t pair : pairs) ++begin[digit(pair)];
    if (begin[digit(pairs[0])] == pairs.size()) continue;
    std::uint32_t total = 0;
    for (std::uint32_t& b : begin) total += std::exchange(b, total);
    for (const std::uint64_t pair : pairs) spare[begin[digit(pair)]++] = pair;
    pairs.swap(spare);
  }
}

}  // namespace

SegmentRanks::SegmentRanks(const Table& table, const Options& options, int n_threads,
                           std::int64_t length)
    : passes_(table, Keep::BAND, options),
      n_threads_(n_threads),
      counts_(n_threads),
      scratch_(n_threads) {
  sorted_.reserve(length);
  spare_.reserve(length);
  distinct_.reserve(length);
}

void SegmentRanks::rank(const Entry& entry, std::int64_t row_begin, std::int64_t row_end,
                        std::int64_t begin, std::int64_t end) {
  begin_ = begin;
  end_ = end;
  const std::size_t stride = end - begin + 64;  // lanes past the end are read
  data_.resize(stride * entry.models.size());
  for (std::size_t k = 0; k < entry.models.size(); ++k)
    rank_model(entry, static_cast<int>(k), row_begin, row_end, data_.data() + k * stride);
  ranks_ = {data_.data(), begin, static_cast<std::int64_t>(stride)};
}

void SegmentRanks::rank_model(const Entry& entry, int model, std::int64_t row_begin,
                              std::int64_t row_end, std::uint32_t* ranks) {
  sort_segment(entry, model);
  index_distinct();
  for (auto& counts : counts_) counts.assign(distinct_.size() + 1, 0);
  const std::int64_t n_chunks = (row_end - row_begin + kChunk - 1) / kChunk;
  parallel_for(n_chunks, n_threads_, [&](std::int64_t chunk, int thread) {
    const std::int64_t from = row_begin + chunk * kChunk, to = std::min(from + kChunk, row_end);
    count(entry, model, from, std::min(to, begin_), thread);
    count(entry, model, std::max(from, end_), to, thread);
  });
  std::uint32_t below = 0;
  std::size_t d = 0;
  for (std::size_t at = 0; at < sorted_.size(); ++at) {
    if (at == 0 || key_of(sorted_[at]) != distinct_[d - 1]) {
      for (const auto& counts : counts_) below += counts[d];
      ++d;
    }
    ranks[static_cast<std::uint32_t>(sorted_[at])] = below + static_cast<std::uint32_t>(at);
  }
}

void SegmentRanks::sort_segment(const Entry& entry, int model) {
  sorted_.resize(end_ - begin_);
  const std::int64_t n_chunks = (end_ - begin_ + kChunk - 1) / kChunk;
  parallel_for(n_chunks, n_threads_, [&](std::int64_t chunk, int thread) {
    const std::int64_t last = std::min(begin_ + (chunk + 1) * kChunk, end_);
    std::uint32_t at = static_cast<std::uint32_t>(chunk * kChunk);
    passes_.for_each_keys(entry, model, begin_ + chunk * kChunk, last, scratch_[thread],
                          [&](const std::uint32_t* keys, std::int64_t n) {
                            for (std::int64_t j = 0; j < n; ++j, ++at)
                              sorted_[at] = std::uint64_t{keys[j]} << 32 | at;
                          });
  });
  sort_by_key(sorted_, spare_);
}

void SegmentRanks::index_distinct() {
  distinct_.clear();
  for (const std::uint64_t pair : sorted_)
    if (distinct_.empty() || key_of(pair) != distinct_.back()) distinct_.push_back(key_of(pair));
  const int bin_bits =
      std::clamp(static_cast<int>(std::bit_width(distinct_.size())), kFewestBinBits, kMostBinBits);
  shift_ = kOctaveBits - bin_bits;
  n_bins_ = 1u << bin_bits;
  const std::uint32_t highest = distinct_.back() >> shift_;
  lowest_bin_ = highest - std::min(highest, n_bins_ - 1);
  first_of_bin_.resize(n_bins_ + 1);
  std::uint32_t d = 0;
  for (std::uint32_t bin = 0; bin <= n_bins_; ++bin) {
    while (d < distinct_.size() &&
           std::max(distinct_[d] >> shift_, lowest_bin_) - lowest_bin_ < bin)
      ++d;
    first_of_bin_[bin] = d;
  }
}

void SegmentRanks::count(const Entry& entry, int model, std::int64_t begin, std::int64_t end,
                         int thread) {
  if (begin >= end) return;
  // A key after the segment is below equal keys of the segment, one before it is not.
  const std::uint32_t later = begin >= end_ ? 1 : 0;
  std::uint32_t* counts = counts_[thread].data();
  const std::uint32_t *first_of_bin = first_of_bin_.data(), *distinct = distinct_.data();
  const std::uint32_t lowest = lowest_bin_, n_bins = n_bins_;
  const int shift = shift_;
  std::uint32_t from[kMaxBlock], until[kMaxBlock];
  // Bins, distinct keys and counts are larger than the second-level cache: a block at a time, so
  // that many loads are under way at once.
  passes_.for_each_keys(
      entry, model, begin, end, scratch_[thread], [&](const std::uint32_t* keys, std::int64_t n) {
        for (std::int64_t j = 0; j < n; ++j) {
          const std::uint32_t bin = std::max((keys[j] + later) >> shift, lowest) - lowest;
          const std::uint32_t* first = first_of_bin + std::min(bin, n_bins - 1);
          from[j] = first[0];
          until[j] = first[1];
          __builtin_prefetch(distinct + first[0]);
        }
        for (std::int64_t j = 0; j < n; ++j) {
          from[j] += first_not_below(distinct + from[j], until[j] - from[j], keys[j] + later);
          __builtin_prefetch(counts + from[j], 1);
        }
        for (std::int64_t j = 0; j < n; ++j) ++counts[from[j]];
      });
}

}  // namespace tvfast
