// Exact order statistics without sorting: sample, bracket, count and collect, and a histogram where
// the sample misled.
//
// Keys are the bits of magnitudes, so they order as unsigned integers with NaN above infinity. Each
// query carries a closed interval that must hold its answer; a pass counts what is above the
// interval and at its ends and collects what lies inside. The sample decides only how many passes
// it takes, never the answer.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "api.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace tvfast {

namespace {

constexpr std::uint32_t kTopKey = kNanKey;
constexpr std::int64_t kSmallGroup = 16384;  // selected from a copy of its keys
constexpr std::int64_t kSampleLine = 16;     // consecutive elements of one sample
constexpr std::int64_t kSampleLines = 8192;
// Half-width of a bracket in standard deviations of an independent sample; elements of a line are
// correlated.
constexpr double kSampleWidth = 3.0;
constexpr std::int64_t kCandidates = std::int64_t{8}
                                     << 20;  // of all queries of a batch together; 4 bytes each
constexpr int kBins = 4096;

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

struct OpenQuery {
  Query* query;
  double n_expected;  // candidates
};

std::int64_t n_sample_lines(std::int64_t n) {
  return std::min(kSampleLines, n / (4 * kSampleLine));
}

// Keys that a bracket of `n` holds at the median, where it is widest.
double expected_candidates(std::int64_t n) {
  if (n <= kSmallGroup) return 0.0;
  return static_cast<double>(n) * kSampleWidth /
         std::sqrt(static_cast<double>(n_sample_lines(n) * kSampleLine));
}

std::uint32_t bin_width(const Query& query) { return (query.hi - query.lo) / kBins + 1; }

struct Selection {
  const Table& table;
  Keep keep;
  const Kernels& kernels;
  int n_threads;
  std::int64_t tile;
  std::vector<std::vector<const Entry*>> group_entries;

  Selection(const Table& table, Keep keep, const Options& options)
      : table(table),
        keep(keep),
        kernels(kernels_for(options.isa)),
        n_threads(parallel_threads(std::int64_t{1} << 30, options.n_threads)),
        tile(tile_length(options.tile)),
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

  void select_from_copy(Stream& stream, Scratch& scratch) {
    std::vector<std::uint32_t> all;
    all.reserve(stream.n);
    for (const Entry* entry : group_entries[stream.group])
      for_each_keys(*entry, stream.model, 0, entry->n, scratch,
                    [&](const std::uint32_t* keys, std::int64_t n) {
                      all.insert(all.end(), keys, keys + n);
                    });
    for (Query& query : stream.queries) resolve(query, all, 0, query.k);
  }

  // The k-th largest of `keys`, with `n_above` more above them all.
  static void resolve(Query& query, std::vector<std::uint32_t>& keys, std::int64_t n_above,
                      std::int64_t k) {
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
    const std::uint32_t value = keys[k - 1];
    // After nth_element everything before position k - 1 is at least as large.
    const auto n_equal = std::count(keys.begin(), keys.end(), value);
    const auto n_greater = std::count_if(keys.begin(), keys.begin() + (k - 1),
                                         [=](std::uint32_t x) { return x > value; });
    query.answer = {value, n_above + n_greater, static_cast<std::int64_t>(n_equal)};
    query.done = true;
  }

  void bracket_from_sample(Stream& stream, Scratch& scratch) {
    const auto& entries = group_entries[stream.group];
    std::vector<std::uint32_t> sample;
    sample.reserve(kSampleLines * kSampleLine);
    std::uint32_t* keys = scratch.keys.get(kMaxBlock + 64);
    // One line at a random place of each of equal strata: no period of the tensor's layout can
    // hide.
    const std::int64_t n_lines = n_sample_lines(stream.n);
    std::size_t e = 0;
    std::int64_t before = 0;
    std::uint64_t state = 0x9E3779B97F4A7C15ull;
    for (std::int64_t line = 0; line < n_lines; ++line) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      const double place =
          (static_cast<double>(line) + static_cast<double>(state >> 11) * 0x1p-53) /
          static_cast<double>(n_lines);
      const std::int64_t at =
          std::min(static_cast<std::int64_t>(place * static_cast<double>(stream.n)), stream.n - 1);
      while (at >= before + entries[e]->n) before += entries[e++]->n;
      const std::int64_t begin =
          std::max<std::int64_t>(0, std::min(at - before, entries[e]->n - kSampleLine));
      const std::int64_t n = std::min(kSampleLine, entries[e]->n - begin);
      kernels.keys(*entries[e], keep, stream.model, begin, n, scratch, keys);
      sample.insert(sample.end(), keys, keys + n);
    }
    const double size = static_cast<double>(sample.size());
    for (Query& query : stream.queries) {
      const double share = static_cast<double>(query.k) / static_cast<double>(stream.n);
      const double deviation = std::sqrt(share * (1.0 - share) * size) + 1.0;
      bracket(query, sample, share * size, kSampleWidth * deviation);
    }
  }

  // An interval of values around the one expected at `rank` of the sample, `margin` places to
  // either side.
  static void bracket(Query& query, std::vector<std::uint32_t>& sample, double rank,
                      double margin) {
    const auto first = static_cast<std::int64_t>(std::floor(rank - margin)),
               last = static_cast<std::int64_t>(std::ceil(rank + margin));
    query.lo = 0;
    query.hi = kTopKey;
    auto from = sample.begin();
    if (first >= 0) {
      from += first;
      std::nth_element(sample.begin(), from, sample.end(), std::greater<>());
      query.hi = *from;
    }
    if (last < std::ssize(sample)) {
      const auto to = sample.begin() + last;
      std::nth_element(from, to, sample.end(), std::greater<>());
      query.lo = *to;
    }
  }

  // Whether a query's keys can be read straight from storage.
  bool scans_taus(const Entry& entry, const Stream& stream, const Query& query) const {
    return keep == Keep::BAND && !query.by_histogram && query.hi < kNanKey &&
           entry.base.data != nullptr && entry.base.dtype == entry.models[stream.model].dtype;
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

  // Moves a query on by what a pass has counted.
  static void advance(Query& query, Found& found) {
    const Bracket& b = found.bracket;
    std::int64_t rank = query.k - b.n_above;
    if (query.by_histogram) {
      const std::uint32_t width = bin_width(query), lo = query.lo;
      int bin = kBins - 1;
      for (; bin > 0 && rank > found.bins[bin]; --bin) rank -= found.bins[bin];
      query.lo = lo + static_cast<std::uint32_t>(bin) * width;
      query.hi = std::min(query.hi, query.lo + (width - 1));
      query.by_histogram = false;
      return;
    }
    const auto search = [&](std::uint32_t lo, std::uint32_t hi) {
      query.lo = lo;
      query.hi = hi;
      query.by_histogram = lo != hi;
    };
    if (rank <= 0) return search(query.hi + 1, kTopKey);
    if (rank <= b.n_hi) {
      query.answer = {query.hi, b.n_above, b.n_hi};
      query.done = true;
      return;
    }
    rank -= b.n_hi;
    if (rank <= b.n_inside) {
      if (static_cast<std::int64_t>(found.n_keys) == b.n_inside) {
        found.keys.resize(found.n_keys);
        return resolve(query, found.keys, b.n_above + b.n_hi, rank);
      }
      return search(query.lo + 1, query.hi - 1);
    }
    rank -= b.n_inside;
    if (query.lo != query.hi && rank <= b.n_lo) {
      query.answer = {query.lo, b.n_above + b.n_hi + b.n_inside, b.n_lo};
      query.done = true;
      return;
    }
    search(0, query.lo - 1);
  }

  void run_batch(std::vector<Stream>& streams, std::size_t begin, std::size_t end) {
    std::vector<Scratch> scratch(n_threads);
    parallel_for(static_cast<std::int64_t>(end - begin), n_threads,
                 [&](std::int64_t task, int thread) {
                   Stream& stream = streams[begin + task];
                   if (stream.n <= kSmallGroup) {
                     select_from_copy(stream, scratch[thread]);
                   } else {
                     bracket_from_sample(stream, scratch[thread]);
                   }
                 });
    for (;;) {
      // All open streams of a group take a tile together: the base's part of it is still cached for
      // the next model.
      std::map<int, std::vector<OpenStream>> open_of_group;
      std::vector<OpenQuery> open;
      double n_expected = 0.0;
      for (std::size_t s = begin; s < end; ++s) {
        auto& queries = streams[s].queries;
        if (std::all_of(queries.begin(), queries.end(), [](const Query& q) { return q.done; }))
          continue;
        open_of_group[streams[s].group].push_back({&streams[s], open.size()});
        for (Query& query : queries) open.push_back({&query, expected_candidates(streams[s].n)});
        n_expected += expected_candidates(streams[s].n) * static_cast<double>(queries.size());
      }
      if (open.empty()) return;
      struct Task {
        const Entry* entry;
        std::int64_t begin, end;
        const std::vector<OpenStream>* open;
      };
      std::vector<Task> tasks;
      for (const auto& [group, of_group] : open_of_group)
        for (const Entry* entry : group_entries[group])
          for (std::int64_t i = 0; i < entry->n; i += tile)
            tasks.push_back({entry, i, std::min(i + tile, entry->n), &of_group});
      std::vector<std::atomic<std::int64_t>> room(open.size());
      for (std::size_t at = 0; at < open.size(); ++at)
        room[at] = static_cast<std::int64_t>(static_cast<double>(kCandidates) *
                                             open[at].n_expected / n_expected);
      const int n_busy = parallel_threads(static_cast<std::int64_t>(tasks.size()), n_threads);
      std::vector<std::vector<Found>> found(n_busy, std::vector<Found>(open.size()));
      for (auto& of_thread : found)
        for (std::size_t at = 0; at < open.size(); ++at)
          of_thread[at].bracket = {open[at].query->lo, open[at].query->hi, 0, 0, 0, 0};
      parallel_for(
          static_cast<std::int64_t>(tasks.size()), n_threads, [&](std::int64_t task, int thread) {
            const Task& t = tasks[task];
            pass_over(*t.entry, t.begin, t.end, *t.open, scratch[thread], found[thread], room);
          });
      parallel_for(static_cast<std::int64_t>(open.size()), n_threads, [&](std::int64_t task, int) {
        Query& query = *open[task].query;
        if (!query.done) advance(query, merge(found, static_cast<std::size_t>(task)));
      });
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

}  // namespace

std::vector<Threshold> thresholds(const Table& table, Keep keep,
                                  const std::vector<RankQuery>& queries, const Options& options) {
  Selection selection(table, keep, options);
  std::vector<Stream> streams;
  std::map<std::pair<int, int>, std::size_t> stream_of;
  for (std::size_t at = 0; at < queries.size(); ++at) {
    const RankQuery& query = queries[at];
    const auto [found, added] = stream_of.try_emplace({query.group, query.model}, streams.size());
    if (added) {
      Stream stream{query.group, query.model, 0, {}};
      for (const Entry* entry : selection.group_entries[query.group]) stream.n += entry->n;
      streams.push_back(stream);
    }
    if (query.k < 1 || query.k > streams[found->second].n)
      throw std::invalid_argument("rank " + std::to_string(query.k) + " of " +
                                  std::to_string(streams[found->second].n) + " keys");
    Query q;
    q.at = at;
    q.k = query.k;
    streams[found->second].queries.push_back(q);
  }
  // As many streams at a time as their candidates have room for, with as much to spare.
  for (std::size_t begin = 0; begin < streams.size();) {
    std::size_t end = begin;
    double n_expected = 0.0;
    do {
      n_expected +=
          expected_candidates(streams[end].n) * static_cast<double>(streams[end].queries.size());
      ++end;
    } while (end < streams.size() && n_expected < static_cast<double>(kCandidates / 2));
    selection.run_batch(streams, begin, end);
    begin = end;
  }
  std::vector<Threshold> result(queries.size());
  for (const Stream& stream : streams)
    for (const Query& query : stream.queries) result[query.at] = query.answer;
  return result;
}

std::vector<Threshold> verify(const Table& table, const std::vector<CountQuery>& queries,
                              const Options& options) {
  Selection selection(table, Keep::BAND, options);
  std::vector<Stream> streams(queries.size());
  std::vector<std::vector<OpenStream>> of_group(table.n_groups());
  for (std::size_t at = 0; at < queries.size(); ++at) {
    Query query;
    query.lo = query.hi = queries[at].key;
    streams[at] = {queries[at].group, queries[at].model, 0, {query}};
    of_group[queries[at].group].push_back({&streams[at], at});
  }
  const std::vector<Tile> tiles = table.tiles(selection.tile, false);
  std::vector<Scratch> scratch(selection.n_threads);
  std::vector<std::atomic<std::int64_t>> room(queries.size());
  std::vector<std::vector<Found>> found(selection.n_threads, std::vector<Found>(queries.size()));
  for (auto& of_thread : found)
    for (std::size_t at = 0; at < queries.size(); ++at)
      of_thread[at].bracket.lo = of_thread[at].bracket.hi = queries[at].key;
  parallel_for(static_cast<std::int64_t>(tiles.size()), selection.n_threads,
               [&](std::int64_t task, int thread) {
                 const Tile& tile = tiles[task];
                 const Entry& entry = table.entries[tile.entry];
                 selection.pass_over(entry, tile.begin, tile.end, of_group[entry.group],
                                     scratch[thread], found[thread], room);
               });
  std::vector<Threshold> result;
  for (std::size_t at = 0; at < queries.size(); ++at) {
    const Bracket& bracket = Selection::merge(found, at).bracket;
    result.push_back({queries[at].key, bracket.n_above, bracket.n_hi});
  }
  return result;
}

std::vector<std::int64_t> nth_equal(const Table& table, Keep keep,
                                    const std::vector<EqualQuery>& queries,
                                    const Options& options) {
  Selection selection(table, keep, options);
  std::vector<std::int64_t> result(queries.size(), -1);
  for (std::size_t q = 0; q < queries.size(); ++q) {
    const EqualQuery& query = queries[q];
    struct Piece {
      const Entry* entry;
      std::int64_t begin, end, position, n_equal;
    };
    std::vector<Piece> pieces;
    for (const Entry* entry : selection.group_entries[query.group])
      for (std::int64_t i = 0; i < entry->n; i += selection.tile)
        pieces.push_back({entry, i, std::min(i + selection.tile, entry->n),
                          entry->group_offset + entry->offset + i, 0});
    std::sort(pieces.begin(), pieces.end(),
              [](const Piece& a, const Piece& b) { return a.position < b.position; });
    std::vector<Scratch> scratch(selection.n_threads);
    parallel_for(static_cast<std::int64_t>(pieces.size()), selection.n_threads,
                 [&](std::int64_t task, int thread) {
                   Piece& piece = pieces[task];
                   selection.for_each_keys(
                       *piece.entry, query.model, piece.begin, piece.end, scratch[thread],
                       [&](const std::uint32_t* keys, std::int64_t n) {
                         piece.n_equal += selection.kernels.count_equal(keys, n, query.key);
                       });
                 });
    std::int64_t left = query.r;
    for (const Piece& piece : pieces) {
      if (left >= piece.n_equal) {
        left -= piece.n_equal;
        continue;
      }
      // On one of parallel_for's threads, whose rounding of subnormals is set.
      parallel_for(1, 1, [&](std::int64_t, int) {
        std::int64_t position = piece.position;
        selection.for_each_keys(*piece.entry, query.model, piece.begin, piece.end, scratch[0],
                                [&](const std::uint32_t* keys, std::int64_t n) {
                                  for (std::int64_t i = 0; i < n; ++i, ++position)
                                    if (keys[i] == query.key && left-- == 0) result[q] = position;
                                });
      });
      break;
    }
  }
  return result;
}

}  // namespace tvfast
