// What bindings may call: the two verbs over a work table, and exact thresholds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../core/divergence.hpp"
#include "../core/drop.hpp"
#include "../core/factored.hpp"
#include "../core/low_rank.hpp"
#include "../core/queries.hpp"
#include "../core/rows.hpp"
#include "../core/table.hpp"
#include "kernels.hpp"

namespace tvfast {

struct Options {
  std::string isa;        // empty: the best, or TVFAST_ISA
  int n_threads = 0;      // <= 0: every core the process may use
  std::int64_t tile = 0;  // elements a thread takes at a time; <= 0: chosen here
};

// What is searched for NaN and infinity while it is combined: base, models and scores of each tile
// just before, which brings them into the cache anyway; results just after, which leaves them
// there.
enum Look : unsigned { kLookAtInputs = 1, kLookAtResults = 2 };

// Writes every entry's `out`, which may be its base or one of its models. The answer is what of
// `look` was found to hold NaN or infinity.
unsigned combine(const Table& table, const Program& program, const Scalars& scalars,
                 const Options& options, unsigned look = 0);

// One Moments per entry, with the fields of `wants` filled.
std::vector<Moments> measure(const Table& table, const Program& program, const Scalars& scalars,
                             unsigned wants, const Options& options);

// Moments of logical entries whose elements come in parts. The sums do not depend on order, so the
// result is that of one table with everything.
class Accumulation {
 public:
  Accumulation(std::size_t n_entries, int n_models);
  // Adds the entries of a part; entry e belongs to logical entry rows[e].
  void measure(const Table& part, const Program& program, const Scalars& scalars, unsigned wants,
               const std::vector<std::size_t>& rows, const Options& options);
  const std::vector<Moments>& moments() const { return moments_; }

 private:
  std::vector<Moments> moments_;
  std::mutex lock_;
};

// Sets the bit planes to the keep stage's answers, and measures in the same pass.
std::vector<Moments> row_masks(const Table& table, const Program& program, const Scalars& scalars,
                               unsigned wants, const Options& options);

// Adds |score_k * tau_k| * weight_k, models in order, to every entry's `out`, which is float32.
void score(const Table& table, const Scalars& scalars, const Options& options);

// Adds the scores of per-sample gradients in factored form. Memory does not depend on the samples.
void score_factored(const std::vector<FactoredScore>& scores, const Options& options);

// <X, P> of each product, in the order-independent accumulator. Throws std::invalid_argument for
// blocks above kLargestBlock.
std::vector<double> kron(const std::vector<KroneckerProduct>& products, const Options& options);

// Writes panels of one product that was multiplied elsewhere and sums their <X, P>; panels may be
// finished in any order.
void finish_product(const ProductPanel& panel, BinnedSum& dot, const Options& options);

// The k-th largest key of each query: n_greater < k <= n_greater + n_equal.
std::vector<Threshold> thresholds(const Table& table, Keep keep,
                                  const std::vector<RankQuery>& queries, const Options& options);

// `thresholds` of groups whose entries come in parts, in constant memory. A sample of the parts
// sets brackets; a pass shows every part to `count` once, in any order; `finish` says whether all
// queries are answered, otherwise another pass is needed, with tighter brackets. Usually one is
// enough. The sample decides how many, never the answers.
class ResumableSelection {
 public:
  // Throws std::invalid_argument if a rank is not one of its group.
  ResumableSelection(Keep keep, const std::vector<RankQuery>& queries,
                     const std::vector<std::int64_t>& group_sizes);
  ~ResumableSelection();

  // Adds keys to the sample, before anything is counted. The share of a group's entries that is
  // shown should be the same everywhere.
  void sample(const Table& part, const Options& options);

  // What the sample expects each answer to be, and whether it would be surprised by another.
  struct Guess {
    std::uint32_t key;
    bool likely;
  };
  std::vector<Guess> guesses(const Options& options);

  void count(const Table& part, const Options& options);

  // Throws std::invalid_argument if the parts since the last call are not the whole groups.
  bool finish();
  const std::vector<Threshold>& answers() const;  // once `finish` was true

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// How many keys of each entry equal each query's: [entry * n_queries + query], 0 in other groups.
std::vector<std::int64_t> count_equal(const Table& table, Keep keep,
                                      const std::vector<CountQuery>& queries,
                                      const Options& options);

// How many keys equal each edge of a query, and lie between it and the next, or above the last:
// [equal to 0, above 0, equal to 1, ...].
std::vector<std::vector<std::int64_t>> partition(const Table& table, Keep keep,
                                                 const std::vector<PartitionQuery>& queries,
                                                 const Options& options);

// How many magnitudes of every task vector lie in [2^(o - 127), 2^(o - 126)): the biased exponent o
// of fp32. Octave 0 holds zero and subnormal numbers, the last one infinity and NaN.
inline constexpr int kOctaves = 256;
std::vector<std::int64_t> count_octaves(const Table& table, const Options& options);

// How many magnitudes of task vectors are above each key, and equal to it: the check of a guessed
// or remembered threshold.
std::vector<Threshold> verify(const Table& table, const std::vector<CountQuery>& queries,
                              const Options& options);

// Position within the group of the r-th entry that equals the key; -1 if there are not so many.
std::vector<std::int64_t> nth_equal(const Table& table, Keep keep,
                                    const std::vector<EqualQuery>& queries, const Options& options);

// Writes elements [begin, end) of W + factor L R, rounded once.
void add_low_rank(const LowRankSum& sum, std::int64_t begin, std::int64_t end,
                  const Options& options);

// The divergence of every row, and the importances; then what is taken over, of `n` elements.
void divergences(const Divergence& matrix, const Options& options);
void fuse(const Fusion& fusion, std::int64_t n, const Options& options);

// How many of `n` values lie in each of [kMagnitudeBins] bins; then draws with their probabilities.
void magnitude_counts(const View& values, std::int64_t n, std::int64_t* counts,
                      const Options& options);
void drop_binned(const BinnedDrop& drop, std::int64_t n, const Options& options);

// Matrices one after the other, row-major, in blocks of rows and columns that each have a factor;
// blocks at the end of a matrix may be smaller.
struct ScaledBlocks {
  Fp8 format = Fp8::E4M3;
  std::int64_t n_rows = 0, n_columns = 0;          // of a matrix
  std::int64_t block_rows = 1, block_columns = 1;  // of a block
  ScaleType scale_type = ScaleType::F32;
  std::int64_t blocks_down() const { return (n_rows + block_rows - 1) / block_rows; }
  std::int64_t blocks_across() const { return (n_columns + block_columns - 1) / block_columns; }
};

// Numbers of the codes of elements [begin, end): code * factor, one rounding. `scales` begins with
// the factors of block row `first_row`, counted over all matrices.
void widen_scaled(const ScaledBlocks& blocks, const void* codes, const void* scales,
                  std::int64_t first_row, std::int64_t begin, std::int64_t end, float* out,
                  const Options& options);

// Codes and factors of elements [begin, end), whole rows of blocks: a factor is the largest finite
// magnitude of its block over that of the format, in fp32, rounded to its type, or up to a power of
// two; a code is nearest to x / factor, ties to even, and no finite number becomes infinity or NaN.
// A block of zeros has the factor 1.
void narrow_scaled(const ScaledBlocks& blocks, const float* values, std::int64_t begin,
                   std::int64_t end, bool power_of_two, void* codes, void* scales,
                   const Options& options);

// Numbers of codes, and codes of numbers: ties to even; beyond the largest number lie NaN (E4M3) or
// infinity (E5M2), or, if `saturate`, that number for everything finite.
void widen_fp8(const void* codes, std::int64_t n, Fp8 format, float* out);
void narrow_fp8(const float* values, std::int64_t n, Fp8 format, bool saturate, void* codes);

// CRC-32C of `n_bytes`, going on from the checksum of what came before; and that of two pieces end
// to end from the checksums of both.
std::uint32_t crc32c(const void* data, std::size_t n_bytes, std::uint32_t seed);
std::uint32_t crc32c_combine(std::uint32_t a, std::uint32_t b, std::uint64_t n_bytes_b);

// Index of the first infinity or NaN of `n` elements at any address, or -1.
std::int64_t first_nonfinite(const void* data, std::int64_t n, DType dtype);

// Fills the windows of all sources from memory or from their files; the first failure ends it. Rows
// are read in order, neighbours in the file together, on the calling thread.
RowFailure gather_rows(const RowGather& gather);

// Lets pages of a file stand in the place of `n_bytes` of private memory, both ends at pages, until
// they are hidden again; writing there leaves the file as it is. False, and nothing is changed but
// the memory's content, if the page cache does not hold all of them, or the system cannot tell.
bool show_pages(void* at, std::size_t n_bytes, int descriptor, std::int64_t offset);
void hide_pages(void* at, std::size_t n_bytes);

// Survives that a file is shortened while pages of it stand in a range: they become zeros, and the
// range is lost. A number from 0 on; -1: cannot be had.
int guard_pages(void* at, std::size_t n_bytes);
bool lost_pages(int guard);
void end_guard(int guard);

// Adds the rows of a matrix to `sums`, from the first on.
void add_rows(const float* matrix, std::int64_t n_rows, std::int64_t row, double* sums);

// Instruction sets that this build holds and this processor can run, best first; and the one that
// runs by default.
std::vector<std::string> isas();
std::string default_isa();

// Cores this process may run on.
int available_threads();

}  // namespace tvfast
