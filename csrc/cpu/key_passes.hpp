// Passes over the keys of a table: counting against brackets, collecting what is inside,
// histograms.
//
// Keys are the bits of magnitudes, so they order as unsigned integers with NaN above infinity.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "api.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace tvfast {

inline constexpr std::uint32_t kTopKey = kNanKey;
inline constexpr int kBins = 4096;

// Measured on an EPYC: counting reaches 0.88 of the memory limit with tiles of this many elements,
// 0.78 with 2^16.
inline constexpr std::int64_t kScanTile = 16384;

struct Query {
  std::size_t at;  // position in the caller's list
  std::int64_t k;
  std::uint32_t lo = 0, hi = kTopKey;
  bool by_histogram = false, done = false;
  Threshold answer{};
};

// All queries on one stream of keys, and what the threads found for them in one pass.
struct Stream {
  int group, model;
  std::int64_t n = 0;
  std::vector<Query> queries;
};

struct Found {
  Bracket bracket;
  std::vector<std::uint32_t> keys;  // the first n_keys count
  std::size_t n_keys = 0;
  std::vector<std::int64_t> bins;

  // Room for `n` more keys.
  std::uint32_t* room_for(std::size_t n) {
    if (keys.size() < n_keys + n) keys.resize(2 * (n_keys + n));
    return keys.data() + n_keys;
  }
};

// A stream with queries to answer, and where those stand among the open queries.
struct OpenStream {
  Stream* stream;
  std::size_t first;
};

inline std::uint32_t bin_width(const Query& query) { return (query.hi - query.lo) / kBins + 1; }

struct KeyPasses {
  const Table& table;
  Keep keep;
  const Kernels& kernels;
  int n_threads;
  std::int64_t tile;
  std::vector<std::vector<const Entry*>> group_entries;

  KeyPasses(const Table& table, Keep keep, const Options& options)
      : table(table),
        keep(keep),
        kernels(kernels_for(options.isa)),
        n_threads(parallel_threads(std::int64_t{1} << 30, options.n_threads)),
        tile(tile_length(options.tile, kScanTile)),
        group_entries(table.n_groups()) {
    for (const Entry& entry : table.entries) group_entries[entry.group].push_back(&entry);
  }

  // fn(keys, n) over the keys of a range, a block at a time.
  template <class Fn>
  void for_each_keys(const Entry& entry, int model, std::int64_t begin, std::int64_t end,
                     Scratch& scratch, Fn&& fn) {
    std::uint32_t* keys = scratch.keys.get(kMaxBlock + 64);
    const std::int64_t length = block_length(table.n_models);
    for (std::int64_t i = begin; i < end; i += length) {
      const std::int64_t n = std::min(length, end - i);
      kernels.keys(entry, keep, model, i, n, scratch, keys);
      fn(keys, n);
    }
  }

  // Whether a query's keys can be read straight from storage.
  bool scans_taus(const Entry& entry, const Stream& stream, const Query& query) const {
    return keep == Keep::BAND && !query.by_histogram && query.hi < kNanKey &&
           entry.origin().data != nullptr && entry.base.dtype == entry.models[stream.model].dtype;
  }

  // Counts of one tile for the queries of some streams; `first` is where a stream's queries stand
  // in `found`.
  void pass_over(const Entry& entry, std::int64_t begin, std::int64_t end,
                 const std::vector<OpenStream>& open, Scratch& scratch, std::vector<Found>& found,
                 std::vector<std::atomic<std::int64_t>>& room) {
    TauScan scans[kScanModels];
    std::size_t at[kScanModels], before[kScanModels];
    int n_scans = 0;
    const auto scan = [&] {
      if (n_scans > 0) kernels.scan_taus(entry, begin, end, scans, n_scans);
      for (int s = 0; s < n_scans; ++s)
        room[at[s]].fetch_sub(found[at[s]].n_keys - before[s], std::memory_order_relaxed);
      n_scans = 0;
    };
    const auto has_room = [&](std::size_t q) {
      return room[q].load(std::memory_order_relaxed) > 0;
    };
    for (const auto& [stream, first] : open) {
      bool needs_keys = false;
      for (std::size_t q = 0; q < stream->queries.size(); ++q) {
        const Query& query = stream->queries[q];
        if (query.done) continue;
        if (!scans_taus(entry, *stream, query)) {
          needs_keys = true;
          continue;
        }
        Found& f = found[first + q];
        const bool collects = query.lo != query.hi && has_room(first + q);
        at[n_scans] = first + q;
        before[n_scans] = f.n_keys;
        scans[n_scans++] = {stream->model, &f.bracket,
                            collects ? f.room_for(end - begin + 2 * kernels.lanes) : nullptr,
                            &f.n_keys};
        if (n_scans == kScanModels) scan();
      }
      if (!needs_keys) continue;
      for_each_keys(entry, stream->model, begin, end, scratch,
                    [&, stream = stream, first = first](const std::uint32_t* keys, std::int64_t n) {
                      for (std::size_t q = 0; q < stream->queries.size(); ++q) {
                        const Query& query = stream->queries[q];
                        Found& f = found[first + q];
                        if (query.done || scans_taus(entry, *stream, query)) continue;
                        if (query.by_histogram) {
                          add_to_bins(query, keys, n, f);
                          continue;
                        }
                        const std::int64_t taken = kernels.scan(
                            keys, n, f.bracket,
                            has_room(first + q) ? f.room_for(n + kernels.lanes) : nullptr);
                        f.n_keys += taken;
                        if (taken > 0) room[first + q].fetch_sub(taken, std::memory_order_relaxed);
                      }
                    });
    }
    scan();
  }

  static void add_to_bins(const Query& query, const std::uint32_t* keys, std::int64_t n, Found& f) {
    f.bins.resize(kBins);
    const std::uint32_t width = bin_width(query);
    for (std::int64_t i = 0; i < n; ++i) {
      if (keys[i] > query.hi) {
        ++f.bracket.n_above;
      } else if (keys[i] >= query.lo) {
        ++f.bins[(keys[i] - query.lo) / width];
      }
    }
  }

  static Found& merge(std::vector<std::vector<Found>>& of_threads, std::size_t at) {
    Found& all = of_threads[0][at];
    for (std::size_t thread = 1; thread < of_threads.size(); ++thread) {
      const Found& f = of_threads[thread][at];
      all.bracket.n_above += f.bracket.n_above;
      all.bracket.n_hi += f.bracket.n_hi;
      all.bracket.n_lo += f.bracket.n_lo;
      all.bracket.n_inside += f.bracket.n_inside;
      std::copy_n(f.keys.begin(), f.n_keys, all.room_for(f.n_keys));
      all.n_keys += f.n_keys;
      all.bins.resize(std::max(all.bins.size(), f.bins.size()));
      for (std::size_t bin = 0; bin < f.bins.size(); ++bin) all.bins[bin] += f.bins[bin];
    }
    return all;
  }
};

}  // namespace tvfast
