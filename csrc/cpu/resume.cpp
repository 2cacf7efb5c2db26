// Exact order statistics of keys that are never in memory at once: a bracket from a sample, counts
// above it and a histogram inside it.
//
// Each query carries a closed interval of keys that holds its answer, and the number of keys above
// that interval. A pass shrinks it: to one key, to one bin, or to what lies beside a bracket that
// missed.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "key_passes.hpp"

namespace tvfast {

namespace {

// All queries together: 48 MiB, 8 MiB, and 16 MiB with the sorted copy; that of more than 16
// streams is larger. Twenty queries then have windows of 5 standard deviations to either side.
constexpr std::int64_t kBinsOfAll = std::int64_t{24} << 20, kFewestBins = 4096;
constexpr int kCoarseBits = 12;
constexpr std::int64_t kCandidatesOfAll = std::int64_t{2} << 20, kFewestCandidates = 4096;
constexpr std::int64_t kSampleOfAll = std::int64_t{2} << 20,
                       kFewestSample = std::int64_t{128} << 10,
                       kLargestSample = std::int64_t{512} << 10;
constexpr std::int64_t kSampleLine = 16;  // consecutive elements of one sample
// Half-width of a bracket in standard deviations, the second time a multiple of it. A miss costs a
// pass over the disk, so brackets are wide.
constexpr double kSampleWidth = 8.0, kGuessWidth = 3.0, kSecondWidth = 3.0;
// Keys that a thread holds before it adds them to a histogram.
constexpr std::size_t kHeldKeys = 16384;

// What the sample holds of one stream: every stride-th line of what was shown.
struct Sample {
  struct Line {
    std::uint32_t run, n;  // which entry of the sampled parts; keys
  };
  std::vector<std::uint32_t> keys, sorted;  // as shown; descending, once counting begins
  std::vector<Line> lines;
  std::uint32_t n_runs = 0;
  std::int64_t n_lines_seen = 0, stride = 1;

  // Keeps every other line, so that more of them have room.
  void thin() {
    std::size_t to = 0, from = 0, n_lines = 0;
    for (std::size_t line = 0; line < lines.size(); from += lines[line++].n) {
      if (line % 2 != 0) continue;
      std::copy_n(keys.begin() + from, lines[line].n, keys.begin() + to);
      to += lines[line].n;
      lines[n_lines++] = lines[line];
    }
    keys.resize(to);
    lines.resize(n_lines);
    stride *= 2;
  }

  // Standard deviation of the number of sampled keys above a value. Keys of a run resemble each
  // other, and runs are spread over everything, so it comes from the differences between
  // neighbouring runs.
  double deviation(std::uint32_t value) const {
    const double size = static_cast<double>(keys.size());
    const double n_above = static_cast<double>(
        std::lower_bound(sorted.begin(), sorted.end(), value, std::greater<>()) - sorted.begin());
    const double share = size > 0.0 ? n_above / size : 0.0;
    const double independent = share * (1.0 - share) * size;
    double squares = 0.0, previous = 0.0;
    std::int64_t n_differences = -1;
    const std::uint32_t* key = keys.data();
    for (std::size_t line = 0; line < lines.size();) {
      const std::uint32_t run = lines[line].run;
      double excess = 0.0;
      for (; line < lines.size() && lines[line].run == run; key += lines[line++].n)
        excess += static_cast<double>(std::count_if(key, key + lines[line].n,
                                                    [=](std::uint32_t x) { return x > value; })) -
                  share * lines[line].n;
      if (++n_differences > 0) squares += (excess - previous) * (excess - previous);
      previous = excess;
    }
    const double between =
        n_differences > 0
            ? 0.5 * squares * (static_cast<double>(n_differences) + 1.0) / n_differences
            : 0.0;
    return std::sqrt(std::max(independent, between)) + 1.0;
  }
};

// One query, between passes and within one.
struct Progress {
  std::uint32_t floor = 0, ceiling = kTopKey;  // the answer is one of these keys
  std::int64_t n_over = 0, n_from = 0;         // keys above the ceiling, and from the floor on
  int n_misses = 0;
  Bracket counts;
  // The keys strictly inside the bracket, counted in bins of 2^shift, and one by one in a window of
  // whole bins around the key that the sample suggests.
  std::vector<std::int64_t> bins;
  std::vector<std::uint16_t> window;
  std::unordered_map<std::uint32_t, std::int64_t> carried;  // from counts of the window: few keys
  int shift = 0;
  std::uint32_t n_bins_inside = 0, window_bin = 0;  // the first in the window
  // Those keys themselves, as long as they are few and the window is not everything: in the tails a
  // few keys lie far apart.
  std::vector<std::uint32_t> candidates;
  std::int64_t n_inside = 0;
  std::mutex lock;

  std::uint32_t first_inside() const { return counts.lo + 1; }
  std::int64_t n_in_window(std::uint32_t at) const {
    const auto found = carried.find(at);
    return window[at] + (found == carried.end() ? 0 : found->second);
  }
  bool in_window(std::uint32_t bin) const { return bin - window_bin < window.size() >> shift; }

  void set_bracket(std::uint32_t lo, std::uint32_t hi, std::uint32_t suggested, std::int64_t n_bins,
                   std::int64_t n_candidates) {
    counts = {lo, hi, 0, 0, 0, 0};
    const std::int64_t n_keys = hi - lo > 1 ? hi - lo - 1 : 0;
    shift = 0;
    if (n_keys > n_bins)
      while (n_keys >> shift >> kCoarseBits > 0) ++shift;
    const std::int64_t n_all = n_keys > 0 ? ((n_keys - 1) >> shift) + 1 : 0,
                       n_window = std::min(n_all, n_bins >> shift),
                       centre = (std::int64_t{suggested} - first_inside()) >> shift;
    window_bin = static_cast<std::uint32_t>(
        std::clamp<std::int64_t>(centre - n_window / 2, 0, n_all - n_window));
    window.assign(n_window << shift, 0);
    carried.clear();
    bins.assign(n_window < n_all ? n_all : 0, 0);
    n_bins_inside = static_cast<std::uint32_t>(n_all);
    n_inside = 0;
    candidates.clear();
    candidates.reserve(n_window < n_all ? n_candidates : 0);
  }

  void add(const std::uint32_t* keys, std::size_t n) {
    const std::uint32_t first = first_inside(), first_in_window = first + (window_bin << shift);
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint32_t at = keys[i] - first_in_window;
      if (at < window.size()) {
        if (++window[at] == 0) carried[at] += std::int64_t{1} << 16;
      } else {
        ++bins[(keys[i] - first) >> shift];
      }
    }
    n_inside += static_cast<std::int64_t>(n);
    if (n_inside <= static_cast<std::int64_t>(candidates.capacity())) {
      candidates.insert(candidates.end(), keys, keys + n);
    } else {
      candidates = {};
    }
  }

  void clear() {
    bins = {};
    window = {};
    candidates = {};
  }
};

// What one thread found for the queries of the group whose tiles it is given.
struct Running {
  int group = -1;
  std::vector<Found> found;
  Scratch scratch;
};

}  // namespace

struct ResumableSelection::State {
  Keep keep;
  std::vector<std::int64_t> n_seen;  // of each group, in this pass
  std::vector<Stream> streams;
  std::vector<Sample> samples;                                   // of each stream
  std::vector<std::vector<std::size_t>> of_group;                // streams
  std::vector<std::vector<std::unique_ptr<Progress>>> progress;  // [stream][query]
  std::vector<Threshold> answers;
  std::int64_t sample_room = 0, n_bins = 0, n_candidates = 0;
  bool counting = false;

  bool done(const Stream& stream) const {
    return std::all_of(stream.queries.begin(), stream.queries.end(),
                       [](const Query& query) { return query.done; });
  }

  // The place of a query's answer in its sorted sample, between the places of its interval's ends.
  double expected(std::size_t s, std::size_t q) const {
    const auto& keys = samples[s].sorted;
    const Progress& now = *progress[s][q];
    const auto place = [&](auto found) { return static_cast<double>(found - keys.begin()); };
    const double first = place(
                     std::lower_bound(keys.begin(), keys.end(), now.ceiling, std::greater<>())),
                 last =
                     place(std::upper_bound(keys.begin(), keys.end(), now.floor, std::greater<>()));
    return first + (last - first) * static_cast<double>(streams[s].queries[q].k - now.n_over) /
                       static_cast<double>(now.n_from - now.n_over);
  }

  // The sampled key at a rank; the limits of a query's interval outside the sample.
  std::uint32_t sampled(std::size_t s, std::size_t q, double rank) const {
    const auto& keys = samples[s].sorted;
    const Progress& now = *progress[s][q];
    if (rank < 0.0) return now.ceiling;
    if (rank >= static_cast<double>(keys.size())) return now.floor;
    return std::clamp(keys[static_cast<std::size_t>(rank)], now.floor, now.ceiling);
  }

  // The keys that the coming pass looks at for one query.
  void set_bracket(std::size_t s, std::size_t q) {
    Progress& now = *progress[s][q];
    std::uint32_t lo = now.floor, hi = now.ceiling;
    // A sample that misled twice is left alone.
    if (hi - lo > n_bins && now.n_misses < 2) {
      const double rank = expected(s, q);
      const double margin = samples[s].deviation(sampled(s, q, rank)) * kSampleWidth *
                            (now.n_misses > 0 ? kSecondWidth : 1.0);
      hi = sampled(s, q, std::floor(rank - margin));
      lo = sampled(s, q, std::ceil(rank + margin));
    }
    now.set_bracket(lo, hi, sampled(s, q, expected(s, q)), n_bins, n_candidates);
    Query& query = streams[s].queries[q];
    query.lo = lo;
    query.hi = hi;
  }

  void begin_pass(int n_threads) {
    if (!counting)
      parallel_for(std::ssize(streams), n_threads, [&](std::int64_t s, int) {
        samples[s].sorted = samples[s].keys;
        std::sort(samples[s].sorted.begin(), samples[s].sorted.end(), std::greater<>());
      });
    counting = true;
    std::fill(n_seen.begin(), n_seen.end(), 0);
    for (std::size_t s = 0; s < streams.size(); ++s)
      for (std::size_t q = 0; q < streams[s].queries.size(); ++q)
        if (!streams[s].queries[q].done) set_bracket(s, q);
  }

  // Moves what a thread holds into the histograms, and the counts as well when it leaves a group.
  void flush(Running& running, bool leaving) {
    if (running.group < 0) return;
    std::size_t at = 0;
    for (const std::size_t s : of_group[running.group]) {
      for (std::size_t q = 0; q < streams[s].queries.size(); ++q, ++at) {
        Found& f = running.found[at];
        if (streams[s].queries[q].done || (!leaving && f.n_keys < kHeldKeys)) continue;
        Progress& now = *progress[s][q];
        const std::lock_guard<std::mutex> guard(now.lock);
        now.add(f.keys.data(), f.n_keys);
        f.n_keys = 0;
        if (!leaving) continue;
        now.counts.n_above += f.bracket.n_above;
        now.counts.n_hi += f.bracket.n_hi;
        now.counts.n_lo += f.bracket.n_lo;
        now.counts.n_inside += f.bracket.n_inside;
      }
    }
  }

  void enter(Running& running, int group) {
    flush(running, true);
    running.group = group;
    std::size_t at = 0;
    for (const std::size_t s : of_group[group]) {
      for (const Query& query : streams[s].queries) {
        if (running.found.size() == at) running.found.emplace_back();
        running.found[at++].bracket = {query.lo, query.hi, 0, 0, 0, 0};
      }
    }
  }

  // Moves a query on by what a pass has counted.
  void advance(std::size_t s, std::size_t q) {
    Query& query = streams[s].queries[q];
    Progress& now = *progress[s][q];
    const Bracket& b = now.counts;
    std::int64_t n_greater = b.n_above;
    const auto holds = [&](std::int64_t n) { return query.k <= n_greater + n; };
    const auto answer = [&](std::uint32_t key, std::int64_t n_equal) {
      answers[query.at] = {key, n_greater, n_equal};
      query.done = true;
      now.clear();
    };
    if (holds(0)) {
      now.floor = b.hi + 1;
      now.n_from = b.n_above;
      ++now.n_misses;
      return;
    }
    if (holds(b.n_hi)) return answer(b.hi, b.n_hi);
    n_greater += b.n_hi;
    if (holds(b.n_inside)) {
      if (std::ssize(now.candidates) == b.n_inside) {
        auto& keys = now.candidates;
        const auto place = keys.begin() + (query.k - n_greater - 1);
        std::nth_element(keys.begin(), place, keys.end(), std::greater<>());
        const std::uint32_t key = *place;
        n_greater += std::count_if(keys.begin(), place, [=](std::uint32_t x) { return x > key; });
        return answer(key, std::count(keys.begin(), keys.end(), key));
      }
      const std::uint32_t width = 1u << now.shift;
      for (std::uint32_t bin = now.n_bins_inside; bin-- > 0;) {
        const std::uint32_t first = now.first_inside() + (bin << now.shift);
        if (now.in_window(bin)) {
          const std::uint32_t in_window = (bin - now.window_bin) << now.shift;
          for (std::uint32_t at = width; at-- > 0;) {
            const std::int64_t n_equal = now.n_in_window(in_window + at);
            if (holds(n_equal)) return answer(first + at, n_equal);
            n_greater += n_equal;
          }
        } else if (holds(now.bins[bin])) {
          now.floor = first;
          now.ceiling = std::min(b.hi - 1, first + (width - 1));
          now.n_over = n_greater;
          now.n_from = n_greater + now.bins[bin];
          return;
        } else {
          n_greater += now.bins[bin];
        }
      }
    }
    n_greater += b.n_inside;
    const std::int64_t n_lo = b.lo != b.hi ? b.n_lo : 0;
    if (n_lo > 0 && holds(n_lo)) return answer(b.lo, n_lo);
    now.ceiling = b.lo - 1;
    now.n_over = n_greater + n_lo;
    ++now.n_misses;
  }
};

ResumableSelection::ResumableSelection(Keep keep, const std::vector<RankQuery>& queries,
                                       const std::vector<std::int64_t>& group_sizes)
    : state_(std::make_unique<State>()) {
  State& me = *state_;
  me.keep = keep;
  me.n_seen.resize(group_sizes.size());
  me.of_group.resize(group_sizes.size());
  me.answers.resize(queries.size());
  std::map<std::pair<int, int>, std::size_t> stream_of;
  for (std::size_t at = 0; at < queries.size(); ++at) {
    const auto& [group, model, k] = queries[at];
    const std::int64_t n =
        group >= 0 && group < std::ssize(group_sizes) ? group_sizes[group] : std::int64_t{0};
    if (k < 1 || k > n)
      throw std::invalid_argument("rank " + std::to_string(k) + " of " + std::to_string(n) +
                                  " keys");
    const auto [found, added] = stream_of.try_emplace({group, model}, me.streams.size());
    if (added) {
      me.of_group[group].push_back(me.streams.size());
      me.streams.push_back({group, model, n, {}});
      me.progress.emplace_back();
    }
    Query query;
    query.at = at;
    query.k = k;
    me.streams[found->second].queries.push_back(query);
    me.progress[found->second].push_back(std::make_unique<Progress>());
    me.progress[found->second].back()->n_from = n;
  }
  me.samples.resize(me.streams.size());
  const auto share = [](std::int64_t all, std::size_t n) {
    return all / std::max<std::int64_t>(1, static_cast<std::int64_t>(n));
  };
  me.sample_room =
      std::clamp(share(kSampleOfAll, me.streams.size()), kFewestSample, kLargestSample);
  me.n_bins = std::max(share(kBinsOfAll, queries.size()), kFewestBins);
  me.n_candidates = std::max(share(kCandidatesOfAll, queries.size()), kFewestCandidates);
}

ResumableSelection::~ResumableSelection() = default;

void ResumableSelection::sample(const Table& part, const Options& options) {
  State& me = *state_;
  if (me.counting) throw std::invalid_argument("a sample is taken before anything is counted");
  KeyPasses passes(part, me.keep, options);
  std::vector<Scratch> scratch(passes.n_threads);
  parallel_for(std::ssize(me.streams), passes.n_threads, [&](std::int64_t s, int thread) {
    const Stream& stream = me.streams[s];
    Sample& sample = me.samples[s];
    if (stream.group >= std::ssize(passes.group_entries)) return;
    std::uint32_t* keys = scratch[thread].keys.get(kMaxBlock + 64);
    for (const Entry* entry : passes.group_entries[stream.group]) {
      const std::uint32_t run = sample.n_runs++;
      for (std::int64_t i = 0; i < entry->n; i += kSampleLine) {
        if (sample.n_lines_seen++ % sample.stride != 0) continue;
        if (std::ssize(sample.keys) >= me.sample_room) {
          sample.thin();
          if ((sample.n_lines_seen - 1) % sample.stride != 0) continue;
        }
        const std::int64_t begin = std::max<std::int64_t>(0, std::min(i, entry->n - kSampleLine));
        const std::int64_t n = std::min(kSampleLine, entry->n - begin);
        passes.kernels.keys(*entry, me.keep, stream.model, begin, n, scratch[thread], keys);
        sample.keys.insert(sample.keys.end(), keys, keys + n);
        sample.lines.push_back({run, static_cast<std::uint32_t>(n)});
      }
    }
  });
}

std::vector<ResumableSelection::Guess> ResumableSelection::guesses(const Options& options) {
  State& me = *state_;
  if (!me.counting) me.begin_pass(options.n_threads);
  std::vector<Guess> result(me.answers.size());
  for (std::size_t s = 0; s < me.streams.size(); ++s) {
    for (std::size_t q = 0; q < me.streams[s].queries.size(); ++q) {
      const double rank = me.expected(s, q);
      const std::uint32_t key = me.sampled(s, q, std::floor(rank));
      const double margin = kGuessWidth * me.samples[s].deviation(key);
      const std::uint32_t above = me.sampled(s, q, std::floor(rank - margin)),
                          below = me.sampled(s, q, std::ceil(rank + margin));
      result[me.streams[s].queries[q].at] = {key, above == below};
    }
  }
  return result;
}

void ResumableSelection::count(const Table& part, const Options& options) {
  State& me = *state_;
  if (!me.counting) me.begin_pass(options.n_threads);
  KeyPasses passes(part, me.keep, options);
  struct Task {
    const Entry* entry;
    std::int64_t begin, end;
  };
  std::vector<Task> tasks;
  std::vector<std::vector<OpenStream>> open(me.of_group.size());
  std::size_t most = 0;
  for (int group = 0; group < std::ssize(passes.group_entries); ++group) {
    if (passes.group_entries[group].empty() || group >= std::ssize(me.of_group)) continue;
    std::size_t n_queries = 0;
    for (const std::size_t s : me.of_group[group]) {
      if (!me.done(me.streams[s])) open[group].push_back({&me.streams[s], n_queries});
      n_queries += me.streams[s].queries.size();
    }
    most = std::max(most, n_queries);
    for (const Entry* entry : passes.group_entries[group]) {
      me.n_seen[group] += entry->n;
      if (open[group].empty()) continue;
      for (std::int64_t i = 0; i < entry->n; i += passes.tile)
        tasks.push_back({entry, i, std::min(i + passes.tile, entry->n)});
    }
  }
  std::vector<std::atomic<std::int64_t>> room(most);
  for (auto& r : room) r = std::numeric_limits<std::int64_t>::max();
  std::vector<Running> running(
      parallel_threads(static_cast<std::int64_t>(tasks.size()), passes.n_threads));
  parallel_for(std::ssize(tasks), passes.n_threads, [&](std::int64_t task, int thread) {
    const Task& t = tasks[task];
    Running& r = running[thread];
    if (r.group != t.entry->group) me.enter(r, t.entry->group);
    passes.pass_over(*t.entry, t.begin, t.end, open[r.group], r.scratch, r.found, room);
    me.flush(r, false);
  });
  for (Running& r : running) me.flush(r, true);
}

bool ResumableSelection::finish() {
  State& me = *state_;
  if (!me.counting) me.begin_pass(1);
  for (const Stream& stream : me.streams)
    if (!me.done(stream) && me.n_seen[stream.group] != stream.n)
      throw std::invalid_argument("group " + std::to_string(stream.group) + " came with " +
                                  std::to_string(me.n_seen[stream.group]) + " keys of " +
                                  std::to_string(stream.n));
  bool all_done = true;
  for (std::size_t s = 0; s < me.streams.size(); ++s) {
    for (std::size_t q = 0; q < me.streams[s].queries.size(); ++q)
      if (!me.streams[s].queries[q].done) me.advance(s, q);
    all_done = all_done && me.done(me.streams[s]);
  }
  if (!all_done) me.begin_pass(1);
  return all_done;
}

const std::vector<Threshold>& ResumableSelection::answers() const { return state_->answers; }

}  // namespace tvfast
