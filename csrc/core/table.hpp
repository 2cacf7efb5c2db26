// The work table: tensors of one call, cut into tiles that threads take in any order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/program.hpp"

namespace tvfast {

struct Entry {
  std::vector<View> models;           // K counterparts
  std::vector<View> scores;           // K or none
  std::vector<ScoreMap> score_maps;   // K or none
  std::vector<std::uint64_t*> masks;  // K bit planes or none
  View base;                          // data == nullptr: none
  void* out = nullptr;
  DType out_dtype = DType::F32;
  std::int64_t n = 0;             // elements
  std::int64_t row = 0;           // elements per row, 0: all
  std::int64_t offset = 0;        // global index of element 0
  std::int64_t run = 0;           // elements between jumps of the global index, 0: it has none
  std::int64_t run_step = 0;      // from the global index of a run's first element to the next's
  std::int64_t group_offset = 0;  // position of global index 0 in the group
  int group = 0;
  bool task_vectors = false;  // the models are task vectors: the base is added, never subtracted

  // What is subtracted from a model; data == nullptr: nothing.
  View origin() const { return task_vectors ? View{} : base; }
  std::int64_t row_length() const { return row > 0 ? row : n; }
  // Global index of element 0 if the run of element i went back that far.
  std::int64_t offset_at(std::int64_t i) const {
    return run > 0 ? offset + i / run * (run_step - run) : offset;
  }
};

struct Tile {
  std::int64_t entry, begin, end;
};

// Elements a thread takes at a time: `usual` unless the caller asked for another number. At most
// 2^24, so that 32-bit counters of a tile cannot overflow.
inline std::int64_t tile_length(std::int64_t asked, std::int64_t usual) {
  return asked > 0 ? std::clamp<std::int64_t>(asked / 64 * 64, 64, std::int64_t{1} << 24) : usual;
}

// Stages that need the rank of an element within its row.
constexpr bool ranks_rows(Keep keep) {
  return keep == Keep::RANDOM_BY_RANK || keep == Keep::BAND_BY_RANK;
}

// Programs whose decisions read the global index of an element.
constexpr bool reads_index(const Program& program) {
  const bool banded =
      program.keep == Keep::BAND || program.keep == Keep::SCORE || program.keep == Keep::VARIANCE;
  return program.keep == Keep::RANDOM || program.keep == Keep::RANDOM_BY_RANK ||
         (banded && program.tie != Tie::GE);
}

struct Table {
  int n_models = 0;
  std::vector<Entry> entries;

  int n_groups() const {
    int most = -1;
    for (const Entry& entry : entries) most = std::max(most, entry.group);
    return most + 1;
  }

  // Tiles of `length` elements, or about so many in whole rows; within runs if asked. A length is a
  // multiple of 64 elements, so that a tile starts at a whole word of a bit plane, except that rows
  // and runs may begin anywhere.
  std::vector<Tile> tiles(std::int64_t length, bool by_rows, bool by_runs = false) const {
    std::vector<Tile> result;
    for (std::size_t e = 0; e < entries.size(); ++e) {
      const Entry& entry = entries[e];
      std::int64_t step = length;
      if (by_rows && entry.n > 0)
        step = std::max<std::int64_t>(1, step / entry.row_length()) * entry.row_length();
      const std::int64_t run = by_runs && entry.run > 0 ? entry.run : std::max(entry.n, step);
      for (std::int64_t first = 0; first < entry.n; first += run) {
        const std::int64_t last = std::min(first + run, entry.n);
        for (std::int64_t begin = first; begin < last; begin += step)
          result.push_back({static_cast<std::int64_t>(e), begin, std::min(begin + step, last)});
      }
    }
    return result;
  }
};

}  // namespace tvfast
