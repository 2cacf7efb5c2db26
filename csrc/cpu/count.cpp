// Counting and finding keys of known value.
#include <algorithm>
#include <atomic>

#include "key_passes.hpp"

namespace tvfast {

std::vector<Threshold> verify(const Table& table, const std::vector<CountQuery>& queries,
                              const Options& options) {
  KeyPasses passes(table, Keep::BAND, options);
  std::vector<Stream> streams(queries.size());
  std::vector<std::vector<OpenStream>> of_group(table.n_groups());
  for (std::size_t at = 0; at < queries.size(); ++at) {
    Query query;
    query.lo = query.hi = queries[at].key;
    streams[at] = {queries[at].group, queries[at].model, 0, {query}};
    of_group[queries[at].group].push_back({&streams[at], at});
  }
  const std::vector<Tile> tiles = table.tiles(passes.tile, false);
  std::vector<Scratch> scratch(passes.n_threads);
  std::vector<std::atomic<std::int64_t>> room(queries.size());
  std::vector<std::vector<Found>> found(passes.n_threads, std::vector<Found>(queries.size()));
  for (auto& of_thread : found)
    for (std::size_t at = 0; at < queries.size(); ++at)
      of_thread[at].bracket.lo = of_thread[at].bracket.hi = queries[at].key;
  parallel_for(static_cast<std::int64_t>(tiles.size()), passes.n_threads,
               [&](std::int64_t task, int thread) {
                 const Tile& tile = tiles[task];
                 const Entry& entry = table.entries[tile.entry];
                 passes.pass_over(entry, tile.begin, tile.end, of_group[entry.group],
                                  scratch[thread], found[thread], room);
               });
  std::vector<Threshold> result;
  for (std::size_t at = 0; at < queries.size(); ++at) {
    const Bracket& bracket = KeyPasses::merge(found, at).bracket;
    result.push_back({queries[at].key, bracket.n_above, bracket.n_hi});
  }
  return result;
}

std::vector<std::int64_t> count_equal(const Table& table, Keep keep,
                                      const std::vector<CountQuery>& queries,
                                      const Options& options) {
  KeyPasses passes(table, keep, options);
  const std::vector<Tile> tiles = table.tiles(passes.tile, false);
  std::vector<Scratch> scratch(passes.n_threads);
  std::vector<std::atomic<std::int64_t>> counts(table.entries.size() * queries.size());
  parallel_for(
      static_cast<std::int64_t>(tiles.size()), passes.n_threads,
      [&](std::int64_t task, int thread) {
        const Tile& tile = tiles[task];
        const Entry& entry = table.entries[tile.entry];
        for (std::size_t q = 0; q < queries.size(); ++q) {
          if (queries[q].group != entry.group) continue;
          std::int64_t n_equal = 0;
          passes.for_each_keys(entry, queries[q].model, tile.begin, tile.end, scratch[thread],
                               [&](const std::uint32_t* keys, std::int64_t n) {
                                 n_equal += passes.kernels.count_equal(keys, n, queries[q].key);
                               });
          counts[tile.entry * queries.size() + q].fetch_add(n_equal, std::memory_order_relaxed);
        }
      });
  return {counts.begin(), counts.end()};
}

std::vector<std::int64_t> count_octaves(const Table& table, const Options& options) {
  KeyPasses passes(table, Keep::BAND, options);
  const std::vector<Tile> tiles = table.tiles(passes.tile, false);
  std::vector<Scratch> scratch(passes.n_threads);
  const std::size_t of_entry = static_cast<std::size_t>(table.n_models) * kOctaves;
  std::vector<std::atomic<std::int64_t>> counts(table.entries.size() * of_entry);
  parallel_for(static_cast<std::int64_t>(tiles.size()), passes.n_threads,
               [&](std::int64_t task, int thread) {
                 const Tile& tile = tiles[task];
                 for (int model = 0; model < table.n_models; ++model) {
                   // Neighbours are of one size, and a counter cannot be raised twice at once.
                   std::int64_t of_tile[4][kOctaves] = {};
                   passes.for_each_keys(table.entries[tile.entry], model, tile.begin, tile.end,
                                        scratch[thread],
                                        [&](const std::uint32_t* keys, std::int64_t n) {
                                          for (std::int64_t i = 0; i < n; ++i)
                                            ++of_tile[i % 4][keys[i] >> 23];
                                        });
                   auto* const all = &counts[tile.entry * of_entry + model * kOctaves];
                   for (int octave = 0; octave < kOctaves; ++octave) {
                     const std::int64_t n = of_tile[0][octave] + of_tile[1][octave] +
                                            of_tile[2][octave] + of_tile[3][octave];
                     if (n > 0) all[octave].fetch_add(n, std::memory_order_relaxed);
                   }
                 }
               });
  return {counts.begin(), counts.end()};
}

std::vector<std::int64_t> nth_equal(const Table& table, Keep keep,
                                    const std::vector<EqualQuery>& queries,
                                    const Options& options) {
  KeyPasses passes(table, keep, options);
  std::vector<std::int64_t> result(queries.size(), -1);
  for (std::size_t q = 0; q < queries.size(); ++q) {
    const EqualQuery& query = queries[q];
    struct Piece {
      const Entry* entry;
      std::int64_t begin, end, position, n_equal;
    };
    std::vector<Piece> pieces;
    for (const Entry* entry : passes.group_entries[query.group])
      for (std::int64_t i = 0; i < entry->n; i += passes.tile)
        pieces.push_back({entry, i, std::min(i + passes.tile, entry->n),
                          entry->group_offset + entry->offset + i, 0});
    std::sort(pieces.begin(), pieces.end(),
              [](const Piece& a, const Piece& b) { return a.position < b.position; });
    std::vector<Scratch> scratch(passes.n_threads);
    parallel_for(static_cast<std::int64_t>(pieces.size()), passes.n_threads,
                 [&](std::int64_t task, int thread) {
                   Piece& piece = pieces[task];
                   passes.for_each_keys(
                       *piece.entry, query.model, piece.begin, piece.end, scratch[thread],
                       [&](const std::uint32_t* keys, std::int64_t n) {
                         piece.n_equal += passes.kernels.count_equal(keys, n, query.key);
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
        passes.for_each_keys(*piece.entry, query.model, piece.begin, piece.end, scratch[0],
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
