// The loops over tiles. Every result of a tile is an integer or an order-independent sum, so tiles
// may run anywhere.
#include <algorithm>
#include <limits>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "api.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace tvfast {

namespace {

// Measured on an EPYC: a linear merge of three models reaches 0.96 of the memory limit with tiles
// of this many elements, 0.92 with 2^14.
constexpr std::int64_t kTile = 65536;

// Below this much output, lines are still cached when the next pass wants them.
constexpr std::int64_t kStreamBytes = std::int64_t{4} << 20;

struct Plan {
  const Kernels& kernels;
  std::vector<Tile> tiles;
  int n_threads;
  std::vector<Scratch> scratch;

  Plan(const Table& table, bool rows, const Options& options)
      : kernels(kernels_for(options.isa)),
        tiles(table.tiles(tile_length(options.tile, kTile), rows)),
        n_threads(parallel_threads(static_cast<std::int64_t>(tiles.size()), options.n_threads)),
        scratch(n_threads) {
    for (const Entry& entry : table.entries)
      if (rows && entry.row_length() > std::numeric_limits<std::uint32_t>::max())
        throw std::invalid_argument("a row of " + std::to_string(entry.row_length()) +
                                    " elements cannot be ranked; at most 2^32 - 1");
  }

  template <class Fn>
  void run(const Table& table, const Program& program, const Scalars& scalars, Fn&& fn) {
    parallel_for(static_cast<std::int64_t>(tiles.size()), n_threads,
                 [&](std::int64_t task, int thread) {
                   const Tile& tile = tiles[task];
                   fn(TileCall{table.entries[tile.entry], program, scalars.tensors[tile.entry],
                               scalars.models.data() + tile.entry * table.n_models, tile.begin,
                               tile.end, scratch[thread]},
                      tile, thread);
                 });
  }
};

bool reads(const Entry& entry, const void* address) {
  if (entry.base.data == address) return true;
  return std::any_of(entry.models.begin(), entry.models.end(),
                     [&](const View& v) { return v.data == address; });
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
  counts(to.n_kept, from.n_kept);
  counts(to.n_nonzero, from.n_nonzero);
  counts(to.n_nonfinite, from.n_nonfinite);
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
  moments.n_kept.resize(k);
  moments.n_nonzero.resize(k);
  moments.n_nonfinite.resize(k);
  return moments;
}

}  // namespace

void combine(const Table& table, const Program& program, const Scalars& scalars,
             const Options& options) {
  Plan plan(table, ranks_rows(program.keep), options);
  plan.run(table, program, scalars, [&](const TileCall& call, const Tile&, int) {
    const Entry& entry = call.entry;
    const bool large =
        entry.n * static_cast<std::int64_t>(size_of(entry.out_dtype)) >= kStreamBytes;
    plan.kernels.combine(call, large && !reads(entry, entry.out));
  });
}

Accumulation::Accumulation(std::size_t n_entries, int n_models)
    : moments_(n_entries, empty_moments(n_models)) {}

void Accumulation::measure(const Table& part, const Program& program, const Scalars& scalars,
                           unsigned wants, const std::vector<std::size_t>& rows,
                           const Options& options) {
  Plan plan(part, ranks_rows(program.keep), options);
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
  plan.run(part, program, scalars, [&](const TileCall& call, const Tile& tile, int thread) {
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
