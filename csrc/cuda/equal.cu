// Counting keys of known value, and finding the r-th of them by position: counts of every tile, a
// search in them, and a scan of one tile.
#include <algorithm>

#include "api.hpp"
#include "packing.hpp"
#include "select.cuh"

namespace tvfast::gpu {

namespace {

struct DeviceEquals {
  const DeviceEqual* queries;
  const GroupMember* members;
  const std::int64_t* places;  // of each entry: tiles of its group before it, by position
  const std::int32_t *first_queries, *first_members;  // of each group
  EqualAnswer* answers;
  std::uint32_t* tiles;  // equal keys of every tile of every query's group
  Count* entries;        // equal keys of every entry, for every query, or not asked for
  std::int32_t n_queries;
  Keep keep;
};

template <Keep keep>
__global__ void __launch_bounds__(kThreads, ranking_blocks(keep))
    count_equal_kernel(DeviceTable table, DeviceEquals s) {
  for (std::int64_t tile = blockIdx.x; tile < table.n_tiles; tile += gridDim.x) {
    const TileSpan span = span_of(table, tile);
    const std::int32_t group = table.entries[span.entry].group;
    const std::int64_t place = s.places[span.entry] + (tile - table.first_tiles[span.entry]);
    for (std::int32_t q = s.first_queries[group]; q < s.first_queries[group + 1]; ++q) {
      const DeviceEqual& query = s.queries[q];
      std::uint32_t n_own = 0;
      for_each_ranked<keep>(table, span, query.model, [&](std::int64_t, int n, const F* x) {
#pragma unroll
        for (int e = 0; e < kQuad; ++e) n_own += e < n && key_of(x[e]) == query.key ? 1u : 0u;
      });
      const std::uint32_t n = block_sum(n_own);
      if (threadIdx.x != 0) continue;
      s.tiles[query.tiles_at + place] = n;
      if (n != 0 && s.entries != nullptr)
        atomicAdd(&s.entries[std::int64_t{span.entry} * s.n_queries + query.place], Count{n});
    }
  }
}

// What comes before the r-th of things that are counted piece by piece, and the piece that holds
// it.
struct Piece {
  std::int64_t number, n_before;  // number == -1: there are only n_before
};

// Searches pieces [0, n) with n_of(i) things each, for all threads.
template <class CountOf>
TVFAST_STAGE Piece find_piece(std::int64_t n, std::int64_t r, CountOf&& n_of) {
  __shared__ std::int64_t number, n_before;
  if (threadIdx.x == 0) number = -1;
  __syncthreads();
  Count passed = 0;
  for (std::int64_t first = 0; first < n; first += kThreads) {
    const std::int64_t i = first + threadIdx.x;
    const Count own = i < n ? n_of(i) : 0;
    Count all;
    const Count before = passed + block_scan(own, all);
    if (r >= 0 && before <= static_cast<Count>(r) && static_cast<Count>(r) < before + own) {
      number = i;
      n_before = static_cast<std::int64_t>(before);
    }
    passed += all;
  }
  __syncthreads();
  const Piece piece{number, number < 0 ? static_cast<std::int64_t>(passed) : n_before};
  __syncthreads();
  return piece;
}

__global__ void __launch_bounds__(kThreads, 2)
    find_equal_kernel(DeviceTable table, DeviceEquals s) {
  const DeviceEqual& query = s.queries[blockIdx.x];
  EqualAnswer& answer = s.answers[query.place];
  const std::uint32_t* tiles = s.tiles + query.tiles_at;
  const Piece found =
      find_piece(query.n_tiles, query.r, [&](std::int64_t i) { return Count{tiles[i]}; });
  if (found.number < 0) {
    if (threadIdx.x == 0) answer = {-1, found.n_before};
    return;
  }
  const std::int32_t m =
      last_not_after(s.first_members[query.group], s.first_members[query.group + 1], found.number,
                     [&](std::int32_t i) { return s.members[i].first_tile; });
  const GroupMember& member = s.members[m];
  const TileSpan span =
      span_of(table, table.first_tiles[member.entry] + (found.number - member.first_tile));
  const DeviceEntry& entry = table.entries[span.entry];
  const auto is_equal = [&](std::int64_t i) {
    F x[kQuad];
    with_keep(s.keep, [&](auto keep) {
      load_ranked<decltype(keep)::value>(entry,
                                         table.models + std::int64_t{span.entry} * table.n_models,
                                         table.n_models, query.model, i, 1, false, x);
    });
    return key_of(x[0]) == query.key;
  };
  const Piece element = find_piece(span.end - span.begin, query.r - found.n_before,
                                   [&](std::int64_t i) { return Count{is_equal(span.begin + i)}; });
  if (threadIdx.x == 0) answer.position = entry.position + span.begin + element.number;
}

DeviceEquals equals_of(const PackedEquals& queries, const void* at, void* workspace) {
  const EqualLayout& layout = queries.layout();
  return {at_bytes<DeviceEqual>(at, 0),
          at_bytes<GroupMember>(at, queries.members_at()),
          at_bytes<std::int64_t>(at, queries.places_at()),
          at_bytes<std::int32_t>(at, queries.first_queries_at()),
          at_bytes<std::int32_t>(at, queries.first_members_at()),
          at_bytes<EqualAnswer>(workspace, layout.answers),
          at_bytes<std::uint32_t>(workspace, layout.tiles),
          queries.by_entry() ? at_bytes<Count>(workspace, layout.entries) : nullptr,
          queries.n_queries(),
          queries.keep()};
}

}  // namespace

void count_equal(const DeviceTable& table, const PackedEquals& queries, const void* at,
                 void* workspace, Place place) {
  const OnDevice current(place.device);
  const EqualLayout& layout = queries.layout();
  if (queries.by_entry())
    fill_zero(at_bytes<std::byte>(workspace, layout.entries), layout.total - layout.entries, place);
  const auto kernel = queries.keep() == Keep::BAND    ? count_equal_kernel<Keep::BAND>
                      : queries.keep() == Keep::SCORE ? count_equal_kernel<Keep::SCORE>
                                                      : count_equal_kernel<Keep::VARIANCE>;
  launch_tiles(kernel, table, place, equals_of(queries, at, workspace));
}

void nth_equal(const DeviceTable& table, const PackedEquals& queries, const void* at,
               void* workspace, Place place) {
  count_equal(table, queries, at, workspace, place);
  const OnDevice current(place.device);
  launch(find_equal_kernel, queries.n_queries(), kThreads, place, table,
         equals_of(queries, at, workspace));
}

std::vector<EqualAnswer> read_positions(const PackedEquals& queries, void* workspace, Place place) {
  const OnDevice current(place.device);
  std::vector<EqualAnswer> answers(queries.n_queries());
  copy_to_host(answers.data(), at_bytes<std::byte>(workspace, queries.layout().answers),
               answers.size() * sizeof(EqualAnswer), place);
  synchronize(place);
  return answers;
}

std::vector<std::int64_t> read_equals(const PackedEquals& queries, void* workspace, Place place) {
  const OnDevice current(place.device);
  std::vector<std::int64_t> counts(std::size_t(queries.n_entries()) * queries.n_queries());
  copy_to_host(counts.data(), at_bytes<std::byte>(workspace, queries.layout().entries),
               counts.size() * sizeof(Count), place);
  synchronize(place);
  return counts;
}

}  // namespace tvfast::gpu
