// Exact order statistics without sorting: sample, bracket, count and collect, and a histogram where
// the sample misled.
//
// Each query carries a closed interval that should hold its answer; a pass counts what is above the
// interval and at its ends and collects what lies inside, and the counts tell whether it did. The
// sample decides only how many passes it takes, never the answer.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "key_passes.hpp"

namespace tvfast {

namespace {

constexpr std::int64_t kSmallGroup = 16384;  // selected from a copy of its keys
constexpr std::int64_t kSampleLine = 16;     // consecutive elements of one sample
constexpr std::int64_t kSampleLines = 8192;
// Half-width of a bracket in standard deviations of an independent sample; elements of a line are
// correlated.
constexpr double kSampleWidth = 3.0;
// Candidates of all queries of a batch together, four bytes each.
constexpr std::int64_t kCandidates = std::int64_t{8} << 20;

struct OpenQuery {
  Query* query;
  double n_expected;  // candidates
};

// n^(2/3) elements, where sampling one and going through the candidates that it saves take equally
// long; 8192 lines from 48 Mi elements on.
std::int64_t n_sample_lines(std::int64_t n) {
  const double root = std::cbrt(static_cast<double>(n));
  return std::min(
      {kSampleLines, n / (4 * kSampleLine), static_cast<std::int64_t>(root * root) / kSampleLine});
}

// Keys that a bracket of `n` holds at the median, where it is widest.
double expected_candidates(std::int64_t n) {
  if (n <= kSmallGroup) return 0.0;
  return static_cast<double>(n) * kSampleWidth /
         std::sqrt(static_cast<double>(n_sample_lines(n) * kSampleLine));
}

struct Selection : KeyPasses {
  using KeyPasses::KeyPasses;

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

}  // namespace tvfast
