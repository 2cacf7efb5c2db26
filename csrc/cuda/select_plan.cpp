#include "select_plan.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "api.hpp"
#include "packing.hpp"

namespace tvfast::gpu {

namespace {

constexpr std::int64_t kMostSampleLines = 32768;

template <class Query>
int n_groups_of(const Table& table, const std::vector<Query>& queries) {
  int n = table.n_groups();
  for (const Query& query : queries) n = std::max(n, query.group + 1);
  return n;
}

}  // namespace

std::int64_t n_sample_lines(std::int64_t n) {
  const double root = std::cbrt(static_cast<double>(n));
  return std::max<std::int64_t>(1,
                                std::min({kMostSampleLines, n / (4 * kSampleLine),
                                          static_cast<std::int64_t>(root * root) / kSampleLine}));
}

std::int64_t n_candidates(std::int64_t n, const SelectionLimits& limits) {
  if (n <= limits.small_group) return 0;
  const double size = static_cast<double>(n_sample_lines(n) * kSampleLine);
  const double expected = kSampleWidth * static_cast<double>(n) / std::sqrt(size);
  return std::min(limits.n_keys, static_cast<std::int64_t>(2.0 * expected) + kSampleLine);
}

GroupMembers members_of(const Table& table, int n_groups) {
  GroupMembers groups;
  std::vector<std::int32_t> order;
  for (std::size_t e = 0; e < table.entries.size(); ++e)
    order.push_back(static_cast<std::int32_t>(e));
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    const Entry &left = table.entries[a], &right = table.entries[b];
    if (left.group != right.group) return left.group < right.group;
    return left.group_offset + left.offset < right.group_offset + right.offset;
  });
  const std::vector<std::int64_t> first_tiles = first_tiles_of(table);
  groups.first.assign(n_groups + 1, 0);
  groups.n_keys.assign(n_groups, 0);
  groups.n_tiles.assign(n_groups, 0);
  for (const std::int32_t e : order) {
    const Entry& entry = table.entries[e];
    groups.members.push_back({groups.n_keys[entry.group], groups.n_tiles[entry.group], e, 0});
    groups.n_keys[entry.group] += entry.n;
    groups.n_tiles[entry.group] += first_tiles[e + 1] - first_tiles[e];
    ++groups.first[entry.group + 1];
  }
  for (int g = 0; g < n_groups; ++g) groups.first[g + 1] += groups.first[g];
  return groups;
}

PackedQueries::PackedQueries(const Table& table, Keep keep, const std::vector<RankQuery>& queries,
                             const SelectionLimits& limits)
    : keep_(keep) {
  const GroupMembers groups = members_of(table, n_groups_of(table, queries));
  for (const RankQuery& asked : queries) {
    DeviceQuery query{};
    query.k = asked.k;
    query.n = groups.n_keys[asked.group];
    if (asked.k < 1 || asked.k > query.n)
      throw std::invalid_argument("rank " + std::to_string(asked.k) + " of " +
                                  std::to_string(query.n) + " keys");
    const bool small = query.n <= limits.small_group;
    query.n_lines = small ? 0 : static_cast<std::int32_t>(n_sample_lines(query.n));
    query.n_sample = small ? static_cast<std::int32_t>(query.n) : query.n_lines * kSampleLine;
    query.n_keys = static_cast<std::int32_t>(n_candidates(query.n, limits));
    query.group = asked.group;
    query.model = asked.model;
    query.place = static_cast<std::int32_t>(queries_.size());
    queries_.push_back(query);
  }
  pack(table, limits);
}

PackedQueries::PackedQueries(const Table& table, Keep keep, const std::vector<CountQuery>& queries)
    : keep_(keep) {
  for (const CountQuery& asked : queries) {
    DeviceQuery query{};
    query.group = asked.group;
    query.model = asked.model;
    query.key = asked.key;
    query.place = static_cast<std::int32_t>(queries_.size());
    queries_.push_back(query);
  }
  pack(table, {.n_queries = std::numeric_limits<std::int64_t>::max()});
}

void PackedQueries::pack(const Table& table, const SelectionLimits& limits) {
  std::stable_sort(queries_.begin(), queries_.end(),
                   [](const DeviceQuery& a, const DeviceQuery& b) {
                     return a.group != b.group ? a.group < b.group : a.model < b.model;
                   });
  const GroupMembers groups = members_of(table, n_groups_of(table, queries_));
  const std::vector<std::int64_t> first_tiles = first_tiles_of(table);
  n_entries_ = static_cast<std::int64_t>(table.entries.size());

  std::int64_t most_sampled = 0, most_keys = 0;
  std::int32_t most_queries = 0;
  for (std::int32_t first = 0; first < n_queries();) {
    SelectionBatch batch{first, first, first_tiles.back(), 0, 0};
    std::int64_t n_keys = 0;
    while (batch.last < n_queries() && batch.last - first < limits.n_queries) {
      DeviceQuery& query = queries_[batch.last];
      if (batch.last > first && n_keys + query.n_keys > limits.n_keys) break;
      query.sample_at = batch.n_sample;
      query.keys_at = n_keys;
      batch.n_sample += query.n_sample;
      n_keys += query.n_keys;
      for (std::int32_t m = groups.first[query.group]; m < groups.first[query.group + 1]; ++m) {
        const std::int32_t e = groups.members[m].entry;
        batch.first_tile = std::min(batch.first_tile, first_tiles[e]);
        batch.end_tile = std::max(batch.end_tile, first_tiles[e + 1]);
      }
      ++batch.last;
    }
    most_sampled = std::max(most_sampled, batch.n_sample);
    most_keys = std::max(most_keys, n_keys);
    most_queries = std::max(most_queries, batch.last - first);
    batches_.push_back(batch);
    first = batch.last;
  }

  std::vector<std::int32_t> first_queries(groups.first.size(), 0);
  for (const DeviceQuery& query : queries_) ++first_queries[query.group + 1];
  for (std::size_t g = 1; g < first_queries.size(); ++g) first_queries[g] += first_queries[g - 1];
  append(bytes_, queries_);
  members_at_ = append(bytes_, groups.members);
  first_queries_at_ = append(bytes_, first_queries);
  first_members_at_ = append(bytes_, groups.first);

  std::size_t at = 0;
  const auto take = [&at](std::size_t n_bytes) {
    const std::size_t before = at;
    at += aligned(n_bytes);
    return before;
  };
  layout_.states = take(queries_.size() * sizeof(QueryState));
  layout_.flags = take(batches_.size() * (kRadixPasses + 1) * sizeof(std::uint32_t));
  layout_.verdicts = take(sizeof(Verdicts));
  layout_.guesses = take(queries_.size() * sizeof(Guess));
  layout_.left = take(table.entries.size() * sizeof(std::uint32_t));
  layout_.row_queries = take(table.entries.size() * table.n_models * sizeof(std::int32_t));
  layout_.bins = take(std::size_t(most_queries) * kDigits * sizeof(Count));
  layout_.samples = take(std::size_t(most_sampled) * sizeof(std::uint32_t));
  layout_.keys = take(std::size_t(most_keys) * sizeof(std::uint32_t));
  layout_.total = at;
}

PackedEquals equals_of(const Table& table, const PackedQueries& queries) {
  std::vector<EqualQuery> equals;
  for (const DeviceQuery& query : queries.queries())
    equals.push_back({query.group, query.model, 0, 0});
  return {table, queries.keep(), equals, false};
}

PackedEquals::PackedEquals(const Table& table, Keep keep, const std::vector<EqualQuery>& queries,
                           bool by_entry)
    : keep_(keep),
      n_queries_(static_cast<std::int32_t>(queries.size())),
      n_entries_(static_cast<std::int32_t>(table.entries.size())),
      by_entry_(by_entry) {
  const GroupMembers groups = members_of(table, n_groups_of(table, queries));
  std::vector<std::int32_t> first_queries(groups.first.size(), 0);
  std::vector<DeviceEqual> packed;
  for (const EqualQuery& asked : queries) {
    packed.push_back({asked.r, 0, groups.n_tiles[asked.group], asked.group, asked.model, asked.key,
                      static_cast<std::int32_t>(packed.size())});
    ++first_queries[asked.group + 1];
  }
  std::stable_sort(packed.begin(), packed.end(),
                   [](const DeviceEqual& a, const DeviceEqual& b) { return a.group < b.group; });
  for (std::size_t g = 1; g < first_queries.size(); ++g) first_queries[g] += first_queries[g - 1];
  std::int64_t n_tiles = 0;
  for (DeviceEqual& query : packed) {
    query.tiles_at = n_tiles;
    n_tiles += query.n_tiles;
  }
  std::vector<std::int64_t> places(table.entries.size());
  for (const GroupMember& member : groups.members) places[member.entry] = member.first_tile;
  append(bytes_, packed);
  members_at_ = append(bytes_, groups.members);
  places_at_ = append(bytes_, places);
  first_queries_at_ = append(bytes_, first_queries);
  first_members_at_ = append(bytes_, groups.first);
  layout_.tiles = aligned(packed.size() * sizeof(EqualAnswer));
  layout_.entries = layout_.tiles + aligned(std::size_t(n_tiles) * sizeof(std::uint32_t));
  layout_.total = layout_.entries;
  if (by_entry) layout_.total += aligned(table.entries.size() * packed.size() * sizeof(Count));
}

}  // namespace tvfast::gpu
