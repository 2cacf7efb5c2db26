// The loops over tiles. Every result of a tile is an integer or an order-independent sum, so tiles
// may run anywhere.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "api.hpp"
#include "isa.hpp"
#include "parallel.hpp"
#include "segment_ranks.hpp"

namespace tvfast {

namespace {

// Measured on an EPYC: a linear merge of three models reaches 0.96 of the memory limit with tiles
// of this many elements, 0.92 with 2^14.
constexpr std::int64_t kTile = 65536;

// Below this much output of a tensor, lines are still cached when the next pass wants them, unless
// the whole table writes more than caches hold.
constexpr std::size_t kStreamBytes = std::size_t{4} << 20;
constexpr std::size_t kStreamTableBytes = std::size_t{64} << 20;

// Rows of more tiles are ranked a segment at a time, in so many bytes together with the bit planes
// of the table; in at least so many, whatever those take. Both for tiles of the usual length.
constexpr std::int64_t kTilesOfRow = 2;
constexpr std::int64_t kRankBytes = std::int64_t{56} << 20,
                       kLeastRankBytes = std::int64_t{12} << 20;

std::int64_t plane_bytes(const Table& table) {
  std::int64_t n_bytes = 0;
  for (const Entry& entry : table.entries)
    n_bytes += static_cast<std::int64_t>(entry.masks.size()) * ((entry.n + 63) / 64 * 8);
  return n_bytes;
}

struct Plan {
  const Table& table;
  const Program& program;
  const Scalars& scalars;
  const Options& options;
  const Kernels& kernels;
  std::int64_t tile;
  std::vector<Tile> tiles, long_rows;
  int n_threads;
  std::vector<Scratch> scratch;

  Plan(const Table& table, const Program& program, const Scalars& scalars, const Options& options)
      : table(table),
        program(program),
        scalars(scalars),
        options(options),
        kernels(kernels_for(options.isa)),
        tile(tile_length(options.tile, kTile)),
        tiles(table.tiles(tile, ranks_rows(program.keep), reads_index(program))) {
    const auto is_long = [&](const Tile& rows) { return has_long_rows(table.entries[rows.entry]); };
    std::copy_if(tiles.begin(), tiles.end(), std::back_inserter(long_rows), is_long);
    std::erase_if(tiles, is_long);
    std::int64_t n_tiles = std::ssize(tiles);
    for (const Tile& row : long_rows) n_tiles += (row.end - row.begin + tile - 1) / tile;
    n_threads = parallel_threads(n_tiles, options.n_threads);
    scratch = std::vector<Scratch>(n_threads);
  }

  // Throws std::invalid_argument if they are too long for ranks of 32 bits.
  bool has_long_rows(const Entry& entry) const {
    if (!ranks_rows(program.keep) || entry.row_length() <= kTilesOfRow * tile) return false;
    if (entry.row_length() > std::numeric_limits<std::uint32_t>::max())
      throw std::invalid_argument("a row of " + std::to_string(entry.row_length()) +
                                  " elements cannot be ranked; at most 2^32 - 1");
    return true;
  }

  // fn(call, tile, thread) for every tile.
  template <class Fn>
  void run(Fn&& fn) {
    run_tiles(tiles, {}, fn);
    if (long_rows.empty()) return;
    const std::int64_t length = segment_length();
    SegmentRanks segment(table, options, n_threads, length);
    for (const auto& [entry, row_begin, row_end] : long_rows) {
      for (std::int64_t begin = row_begin; begin < row_end; begin += length) {
        const std::int64_t end = std::min(begin + length, row_end);
        segment.rank(table.entries[entry], row_begin, row_end, begin, end);
        std::vector<Tile> parts;
        for (std::int64_t i = begin; i < end; i += tile)
          parts.push_back({entry, i, std::min(i + tile, end)});
        run_tiles(parts, segment.ranks(), fn);
      }
    }
  }

 private:
  std::int64_t segment_length() const {
    const std::int64_t n_bytes = std::max(kRankBytes - plane_bytes(table), kLeastRankBytes);
    const std::int64_t tile_bytes =
        kTile * SegmentRanks::bytes_per_entry(table.n_models, n_threads);
    return std::max<std::int64_t>(1, n_bytes / tile_bytes) * tile;
  }

  template <class Fn>
  void run_tiles(const std::vector<Tile>& parts, const RowRanks& ranks, Fn& fn) {
    parallel_for(std::ssize(parts), n_threads, [&](std::int64_t task, int thread) {
      const Tile& part = parts[task];
      fn(TileCall{table.entries[part.entry], program, scalars.tensors[part.entry],
                  scalars.models.data() + part.entry * table.n_models, part.begin, part.end,
                  table.entries[part.entry].offset_at(part.begin), scratch[thread], ranks},
         part, thread);
    });
  }
};

bool reads(const Entry& entry, const void* address) {
  if (entry.base.data == address) return true;
  return std::any_of(entry.models.begin(), entry.models.end(),
                     [&](const View& v) { return v.data == address; });
}

bool is_finite(const Kernels& kernels, const void* data, DType dtype, const TileCall& call) {
  if (data == nullptr) return true;
  const auto* begin =
      static_cast<const std::byte*>(data) + static_cast<std::size_t>(call.begin) * size_of(dtype);
  return kernels.first_nonfinite(begin, call.end - call.begin, dtype) < 0;
}

bool has_finite_inputs(const Kernels& kernels, const TileCall& call) {
  const auto finite = [&](const View& view) {
    return is_finite(kernels, view.data, view.dtype, call);
  };
  const Entry& entry = call.entry;
  return finite(entry.base) && std::all_of(entry.models.begin(), entry.models.end(), finite) &&
         std::all_of(entry.scores.begin(), entry.scores.end(), finite);
}

std::size_t out_bytes(const Entry& entry) {
  return static_cast<std::size_t>(entry.n) * size_of(entry.out_dtype);
}

void add(Moments& to, const Moments& from) {
  const auto sums = [](std::vector<BinnedSum>& a, const std::vector<BinnedSum>& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i].add(b[i]);
  };
  const auto counts = [](std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  };
  sums(to.l1_before, from.l1_before);
  sums(to.l1, from.l1);
  sums(to.gram, from.gram);
  sums(to.dots, from.dots);
  counts(to.n_kept, from.n_kept);
  counts(to.n_nonzero, from.n_nonzero);
  counts(to.n_nonfinite, from.n_nonfinite);
  counts(to.n_alone, from.n_alone);
  to.n_base_nonfinite += from.n_base_nonfinite;
  to.elected += from.elected;
  to.n_conflict += from.n_conflict;
}

Moments empty_moments(int n_models) {
  const std::size_t k = static_cast<std::size_t>(n_models);
  Moments moments;
  moments.l1_before.resize(k);
  moments.l1.resize(k);
  moments.gram.resize(k * k);
  moments.dots.resize(k);
  moments.n_kept.resize(k);
  moments.n_nonzero.resize(k);
  moments.n_nonfinite.resize(k);
  moments.n_alone.resize(k);
  return moments;
}

}  // namespace

unsigned combine(const Table& asked, const Program& program, const Scalars& scalars,
                 const Options& options, unsigned look) {
  Table table = asked;
  Plan plan(table, program, scalars, options);
  // A long row is read once more for every segment, so its inputs stay until all are written.
  std::vector<std::unique_ptr<std::byte[]>> held(table.entries.size());
  std::size_t n_written = 0;
  for (std::size_t e = 0; e < held.size(); ++e) {
    Entry& entry = table.entries[e];
    n_written += out_bytes(entry);
    if (!plan.has_long_rows(entry) || !reads(entry, entry.out)) continue;
    held[e] = std::make_unique_for_overwrite<std::byte[]>(out_bytes(entry));
    entry.out = held[e].get();
  }
  std::atomic<unsigned> found{0};
  plan.run([&](const TileCall& call, const Tile&, int) {
    const Entry& entry = call.entry;
    const bool stays = (look & kLookAtResults) != 0;
    if ((look & kLookAtInputs) != 0 && !has_finite_inputs(plan.kernels, call))
      found.fetch_or(kLookAtInputs, std::memory_order_relaxed);
    const bool large = n_written >= kStreamTableBytes || out_bytes(entry) >= kStreamBytes;
    plan.kernels.combine(call, large && !stays && !reads(entry, entry.out));
    if (stays && !is_finite(plan.kernels, entry.out, entry.out_dtype, call))
      found.fetch_or(kLookAtResults, std::memory_order_relaxed);
  });
  for (std::size_t e = 0; e < held.size(); ++e)
    if (held[e]) std::memcpy(asked.entries[e].out, held[e].get(), out_bytes(asked.entries[e]));
  return found.load();
}

void score(const Table& table, const Scalars& scalars, const Options& options) {
  const Program program;
  Plan plan(table, program, scalars, options);
  plan.run([&](const TileCall& call, const Tile&, int) { plan.kernels.score(call); });
}

Accumulation::Accumulation(std::size_t n_entries, int n_models)
    : moments_(n_entries, empty_moments(n_models)) {}

void Accumulation::measure(const Table& part, const Program& program, const Scalars& scalars,
                           unsigned wants, const std::vector<std::size_t>& rows,
                           const Options& options) {
  Plan plan(part, program, scalars, options);
  // A thread adds up the tiles of one entry by itself for as long as it gets tiles of that entry.
  struct Running {
    std::int64_t entry = -1;
    Moments moments;
  };
  std::vector<Running> running(plan.n_threads);
  const auto flush = [&](Running& r) {
    if (r.entry < 0) return;
    const std::lock_guard<std::mutex> guard(lock_);
    add(moments_[rows[r.entry]], r.moments);
  };
  plan.run([&](const TileCall& call, const Tile& tile, int thread) {
    Running& r = running[thread];
    if (r.entry != tile.entry) {
      flush(r);
      r = {tile.entry, empty_moments(part.n_models)};
    }
    plan.kernels.measure(call, wants, r.moments);
  });
  for (Running& r : running) flush(r);
}

std::vector<Moments> measure(const Table& table, const Program& program, const Scalars& scalars,
                             unsigned wants, const Options& options) {
  Accumulation all(table.entries.size(), table.n_models);
  std::vector<std::size_t> rows(table.entries.size());
  std::iota(rows.begin(), rows.end(), std::size_t{0});
  all.measure(table, program, scalars, wants, rows, options);
  return all.moments();
}

std::vector<Moments> row_masks(const Table& table, const Program& program, const Scalars& scalars,
                               unsigned wants, const Options& options) {
  for (const Entry& entry : table.entries)
    for (std::uint64_t* words : entry.masks)
      std::fill_n(words, (entry.n + 63) / 64, std::uint64_t{0});
  return measure(table, program, scalars, wants | kPlanes, options);
}

}  // namespace tvfast
