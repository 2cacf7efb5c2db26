// Keys counted between given edges: what the processes that each hold a part of a tensor tell one
// another about it.
#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <mutex>

#include "key_passes.hpp"

namespace tvfast {

namespace {

using Counts = std::vector<std::int64_t>;

// What one thread found for the queries of the group whose tiles it is given.
struct Running {
  int group = -1;
  std::vector<Found> found;
  Scratch scratch;
};

// Shows every key strictly between the ends of a query to `inside`, and calls `counted` with the
// bracket of a query that a thread is done with; the latter under a lock.
class BracketPass {
 public:
  using Inside = std::function<void(std::size_t query, const std::uint32_t* keys, std::size_t n)>;
  using Counted = std::function<void(std::size_t query, const Bracket& bracket)>;

  BracketPass(const Table& table, Keep keep, const Options& options)
      : passes_(table, keep, options), table_(table), open_(table.n_groups()) {}

  void run(const std::vector<PartitionQuery>& queries, const Inside& inside,
           const Counted& counted) {
    std::vector<Stream> streams(queries.size());
    std::size_t most = 0;
    for (std::size_t at = 0; at < queries.size(); ++at) {
      const auto& [group, model, edges] = queries[at];
      if (group < 0 || group >= std::ssize(open_)) continue;
      Query query;
      query.at = at;
      query.lo = edges.front();
      query.hi = edges.back();
      streams[at] = {group, model, 0, {query}};
      open_[group].push_back({&streams[at], open_[group].size()});
      most = std::max(most, open_[group].size());
    }
    std::vector<Tile> tiles = table_.tiles(passes_.tile, false);
    std::erase_if(
        tiles, [&](const Tile& tile) { return open_[table_.entries[tile.entry].group].empty(); });
    std::vector<std::atomic<std::int64_t>> room(most);
    for (auto& r : room) r = std::numeric_limits<std::int64_t>::max();
    std::vector<Running> running(parallel_threads(std::ssize(tiles), passes_.n_threads));
    parallel_for(std::ssize(tiles), passes_.n_threads, [&](std::int64_t task, int thread) {
      const Tile& tile = tiles[task];
      const Entry& entry = table_.entries[tile.entry];
      Running& r = running[thread];
      if (r.group != entry.group) enter(r, entry.group, counted);
      passes_.pass_over(entry, tile.begin, tile.end, open_[r.group], r.scratch, r.found, room);
      for (const auto& [stream, first] : open_[r.group]) {
        Found& found = r.found[first];
        inside(stream->queries[0].at, found.keys.data(), found.n_keys);
        found.n_keys = 0;
      }
    });
    for (Running& r : running) leave(r, counted);
  }

 private:
  void leave(Running& r, const Counted& counted) {
    if (r.group < 0) return;
    const std::lock_guard<std::mutex> guard(lock_);
    for (const auto& [stream, first] : open_[r.group])
      counted(stream->queries[0].at, r.found[first].bracket);
  }

  void enter(Running& r, int group, const Counted& counted) {
    leave(r, counted);
    r.group = group;
    r.found.resize(std::max(r.found.size(), open_[group].size()));
    for (const auto& [stream, first] : open_[group])
      r.found[first].bracket = {stream->queries[0].lo, stream->queries[0].hi, 0, 0, 0, 0};
  }

  KeyPasses passes_;
  const Table& table_;
  std::vector<std::vector<OpenStream>> open_;
  std::mutex lock_;
};

}  // namespace

std::vector<Counts> partition(const Table& table, Keep keep,
                              const std::vector<PartitionQuery>& queries, const Options& options) {
  std::vector<Counts> result;
  for (const PartitionQuery& query : queries) result.emplace_back(2 * query.edges.size());
  std::vector<std::vector<std::atomic<std::int64_t>>> inner;  // strictly between the ends
  for (const Counts& counts : result) inner.emplace_back(counts.size());
  BracketPass(table, keep, options)
      .run(
          queries,
          [&](std::size_t q, const std::uint32_t* keys, std::size_t n) {
            const auto& edges = queries[q].edges;
            Counts of_tile(2 * edges.size());
            for (std::size_t i = 0; i < n; ++i) {
              const auto edge = std::lower_bound(edges.begin(), edges.end(), keys[i]);
              const std::size_t at = 2 * static_cast<std::size_t>(edge - edges.begin());
              ++of_tile[*edge == keys[i] ? at : at - 1];
            }
            for (std::size_t at = 0; at < of_tile.size(); ++at)
              if (of_tile[at] > 0) inner[q][at].fetch_add(of_tile[at], std::memory_order_relaxed);
          },
          [&](std::size_t q, const Bracket& bracket) {
            result[q].back() += bracket.n_above;
            result[q][result[q].size() - 2] += bracket.n_hi;
            if (queries[q].edges.size() > 1) result[q].front() += bracket.n_lo;
          });
  for (std::size_t q = 0; q < result.size(); ++q)
    for (std::size_t i = 0; i < result[q].size(); ++i) result[q][i] += inner[q][i];
  return result;
}

}  // namespace tvfast
