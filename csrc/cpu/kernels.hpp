// What one instruction set provides: functions over a block or a tile. isa.hpp chooses a table
// once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "../core/codes.hpp"
#include "../core/divergence.hpp"
#include "../core/drop.hpp"
#include "../core/factored.hpp"
#include "../core/low_rank.hpp"
#include "../core/moments.hpp"
#include "../core/queries.hpp"
#include "../core/table.hpp"

namespace tvfast {

// Elements that a stage processes at a time: the floats of base, K task vectors and the result stay
// in the first-level cache.
inline constexpr std::int64_t kMaxBlock = 1024, kMinBlock = 128;
inline std::int64_t block_length(int n_models) {
  return std::clamp<std::int64_t>(8192 / (n_models + 2) / 64 * 64, kMinBlock, kMaxBlock);
}

// Rows of fewer elements are sorted: there are more bins to count in than elements.
inline constexpr std::int64_t kFewToCount = 256;

// Rows from here on have more octaves of bins, which more keys then share.
inline constexpr std::int64_t kRowOfManyBins = 2048;

// Rows are counted if at most one key in so many is longer than 16 bits.
inline constexpr std::int64_t kLongerKeys = 8;

// A growing array on 64-byte boundaries; never shrinks, contents are lost on growth.
template <class T>
class Buffer {
 public:
  T* get(std::size_t n) {
    if (n > capacity_) {
      data_.reset();
      data_.reset(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})));
      capacity_ = n;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t capacity_ = 0;
};

// One thread's memory.
struct Scratch {
  Buffer<float> base, taus, rows, score, shares, result;
  Buffer<float> largest;  // magnitudes of each task vector in the block before
  Buffer<std::uint32_t> draws, keys, ranks, bins, bin_of, longer;
  Buffer<std::uint16_t> short_bins, short_starts, short_index;
  Buffer<std::uint64_t> sorted, kept;
  Buffer<double> exponents;
};

// Ranks of consecutive entries within their rows, of every model.
struct RowRanks {
  const std::uint32_t* data = nullptr;  // of model k from k * stride on
  std::int64_t begin = 0, stride = 0;   // the first entry
  const std::uint32_t* of(int model, std::int64_t i) const {
    return data + model * stride + (i - begin);
  }
};

struct TileCall {
  const Entry& entry;
  const Program& program;
  const TensorScalars& tensor;
  const ModelScalars* models;  // [K]
  std::int64_t begin, end;     // within the entry
  std::int64_t offset;         // global index of element i of the tile less i
  Scratch& scratch;
  RowRanks ranks = {};  // of the tile, where its rows are too long to be ranked as a whole
  int n_models() const { return static_cast<int>(entry.models.size()); }
};

// Beside Wants: a measurement sets the bits of what is kept in the entries' planes of zeros.
inline constexpr unsigned kPlanes = 1u << 31;

// Keys between two ends: how many above `hi`, equal to it, equal to `lo`; those strictly between
// are collected.
struct Bracket {
  std::uint32_t lo = 0, hi = 0;
  std::int64_t n_above = 0, n_hi = 0, n_lo = 0, n_inside = 0;
};

inline constexpr int kScanModels = 4;

struct TauScan {
  int model;
  Bracket* bracket;
  std::uint32_t* out;  // keys strictly inside go here, room for the tile and two vectors more; null
                       // only counts
  std::size_t* n_taken;  // how many were written is added here
};

// A tile of a layer's scores, and how many tokens of a sample are packed at a time: with theta, the
// accumulator and the packed factors it fits in a second-level cache of 1 MiB.
inline constexpr std::int64_t kFactoredRows = 140, kFactoredColumns = 256, kFactoredDepth = 128;

struct FactoredTile {
  const FactoredScore& score;
  std::int64_t row_begin, row_end, column_begin, column_end;
  Scratch& scratch;
};

// Whole blocks of a Kronecker product, at most kLargestBlock rows and columns.
struct KronTile {
  const KroneckerProduct& product;
  std::int64_t b_begin, b_end, a_begin, a_end;  // blocks of B and of A
  Scratch& scratch;
};

// Rows of a low-rank tile: with the packed factors of its columns it fits a second-level cache.
inline constexpr std::int64_t kLowRankRows = 112;

struct LowRankTile {
  const LowRankSum& sum;
  std::int64_t row_begin, row_end, column_begin, column_end;  // at most low_rank_columns(rank)
  Scratch& scratch;
};

// Columns of a tile, a multiple of any tile of registers.
inline std::int64_t low_rank_columns(std::int64_t rank) {
  return std::clamp<std::int64_t>((1 << 15) / std::max<std::int64_t>(rank, 1) / 64 * 64, 64, 512);
}

struct Kernels {
  const char* name;
  int lanes;
  void (*combine)(const TileCall& call, bool streaming);
  void (*measure)(const TileCall& call, unsigned wants, Moments& moments);
  // Ranks of the magnitudes of a row, ascending, equal ones by index and every NaN alike. The row
  // has room for a vector of zeros, and so have the ranks for whatever.
  void (*rank_row)(float* row, std::int64_t n, Scratch& scratch, std::uint32_t* rank);
  // Magnitude bits of `n` keys of `model` from `begin`, where `keep` says which key: tau, score or
  // variance.
  void (*keys)(const Entry& entry, Keep keep, int model, std::int64_t begin, std::int64_t n,
               Scratch& scratch, std::uint32_t* out);
  // Counts the task vectors of n <= kScanModels models straight from storage: base and models of
  // one type.
  void (*scan_taus)(const Entry& entry, std::int64_t begin, std::int64_t end, const TauScan* scans,
                    int n);
  // Counts; keys strictly inside are written to `out`, which has room for n + lanes, unless it is
  // null. Returns how many.
  std::int64_t (*scan)(const std::uint32_t* keys, std::int64_t n, Bracket& bracket,
                       std::uint32_t* out);
  std::int64_t (*count_equal)(const std::uint32_t* keys, std::int64_t n, std::uint32_t value);
  // Index of the first infinity or NaN of `n` elements at any address, or -1.
  std::int64_t (*first_nonfinite)(const void* data, std::int64_t n, DType dtype);
  // Widens n elements to exactly as many floats, also in place where both end together.
  void (*widen_run)(const void* from, DType dtype, std::int64_t n, float* out);
  // The mean of runs of n floats, and a matrix added to a row of sums.
  void (*mean_run)(const float* const* runs, int n_runs, std::int64_t n, float* out);
  void (*add_rows)(const float* matrix, std::int64_t n_rows, std::int64_t row, double* sums);
  // Adds |score_k * tau_k| * weight_k to the float32 output.
  void (*score)(const TileCall& call);
  void (*factored)(const FactoredTile& tile);
  // The dot product of X and P is added to `dot`.
  void (*kron)(const KronTile& tile, BinnedSum& dot);
  void (*finish_rows)(const ProductPanel& panel, std::int64_t begin, std::int64_t end,
                      Scratch& scratch, BinnedSum& dot);
  void (*add_low_rank)(const LowRankTile& tile);
  void (*divergence_of_row)(const Divergence& matrix, std::int64_t row, Scratch& scratch);
  void (*fuse_run)(const Fusion& fusion, std::int64_t begin, std::int64_t n, Scratch& scratch);
  // Adds to [kMagnitudeBins] counts; then the draws by them.
  void (*count_magnitudes)(const View& values, std::int64_t begin, std::int64_t n,
                           std::uint32_t* counts);
  void (*drop_binned)(const BinnedDrop& drop, std::int64_t begin, std::int64_t n, Scratch& scratch);
  // Codes times their factor.
  void (*widen_fp8)(const std::uint8_t* codes, std::int64_t n, Fp8 format, float factor,
                    float* out);
  // The largest finite magnitude, +0 of none.
  float (*largest_finite)(const float* values, std::int64_t n);
  // Codes of values over their factor.
  void (*narrow_fp8)(const float* values, std::int64_t n, Fp8 format, float factor, bool saturate,
                     std::uint8_t* codes);
};

}  // namespace tvfast
