// Tiles of a device table: which entry a tile belongs to, and how its elements are dealt to
// threads.
#pragma once

#include <algorithm>

#include "lanes.cuh"

namespace tvfast::gpu {

// Starts a kernel whose blocks take the tiles of a table in turn: as many as run at once, or one a
// tile.
template <class... Parameters, class... Arguments>
void launch_tiles(void (*kernel)(DeviceTable, Parameters...), const DeviceTable& table, Place place,
                  Arguments... arguments) {
  launch(kernel, std::min(table.n_tiles, blocks_at_once(kernel, kThreads, place)), kThreads, place,
         table, arguments...);
}

// The entry that a tile belongs to: the last one that starts at or before it.
static __device__ __forceinline__ std::int32_t find_entry(const DeviceTable& table,
                                                          std::int64_t tile) {
  std::int32_t low = 0, high = table.n_entries;
  while (high - low > 1) {
    const std::int32_t middle = low + (high - low) / 2;
    if (__ldg(table.first_tiles + middle) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// One tile of one entry. [begin, body) and [body_end, end) are the few elements around those that
// can be taken `step` at a time.
struct TileSpan {
  std::int32_t entry;
  std::int64_t begin, body, body_end, end;
};

// Elements of an entry's form that a thread takes at once.
static __device__ __forceinline__ int step_of(Form form) {
  return form <= Form::PACKED_F16 ? 2 * kQuad : kQuad;
}

static __device__ __forceinline__ TileSpan span_of(const DeviceTable& table, std::int64_t tile) {
  TileSpan span;
  span.entry = find_entry(table, tile);
  const DeviceEntry& entry = table.entries[span.entry];
  const std::int64_t number = tile - table.first_tiles[span.entry];
  const std::int64_t head = entry.head < entry.n ? entry.head : entry.n;
  span.body = head + number * kTile;
  span.begin = number == 0 ? 0 : span.body;
  span.end = span.body + kTile < entry.n ? span.body + kTile : entry.n;
  span.body_end = span.body + (span.end - span.body) / step_of(entry.form) * step_of(entry.form);
  return span;
}

// Calls fn(i, n, whole) for all quads of a tile, n <= 4 elements from i on; a whole quad may be one
// load of each tensor.
template <class Fn>
static __device__ __forceinline__ void for_each_quad(const DeviceEntry& entry, const TileSpan& span,
                                                     Fn&& fn) {
  const bool whole = entry.form != Form::SINGLES;
#pragma unroll 1
  for (std::int64_t i = span.body + kQuad * static_cast<int>(threadIdx.x); i < span.body_end;
       i += kQuad * static_cast<int>(blockDim.x))
    fn(i, kQuad, whole);
}

// The elements around them, one at a time.
template <class Fn>
static __device__ __forceinline__ void for_each_edge(const TileSpan& span, Fn&& fn) {
  const int before = static_cast<int>(span.body - span.begin);
  const int after = static_cast<int>(span.end - span.body_end);
  const int at = static_cast<int>(threadIdx.x);
  if (at < before) {
    fn(span.begin + at, 1, false);
  } else if (at - before < after) {
    fn(span.body_end + (at - before), 1, false);
  }
}

// Both, or the elements around alone: fn's text is in the kernel once, which is what long texts
// need.
template <class Fn>
static __device__ __forceinline__ void for_each(const DeviceEntry& entry, const TileSpan& span,
                                                bool quads, Fn&& fn) {
  const bool whole = entry.form != Form::SINGLES;
  const int before = static_cast<int>(span.body - span.begin);
  const int after = static_cast<int>(span.end - span.body_end);
  const int at = static_cast<int>(threadIdx.x);
  std::int64_t i = quads ? span.body + kQuad * at : span.body_end;
  bool around = at < before + after;
#pragma unroll 1
  while (i < span.body_end || around) {
    const bool inside = i < span.body_end;
    if (!inside) {
      i = at < before ? span.begin + at : span.body_end + (at - before);
      around = false;
    }
    fn(i, inside ? kQuad : 1, inside && whole);
    i = inside ? i + kQuad * static_cast<int>(blockDim.x) : span.body_end;
  }
}

// A tile cut at multiples of kTile from element 0, which bit planes need: their words are not
// shared by two tiles.
static __device__ __forceinline__ TileSpan whole_words_of(const DeviceTable& table,
                                                          std::int64_t tile) {
  TileSpan span;
  span.entry = find_entry(table, tile);
  const DeviceEntry& entry = table.entries[span.entry];
  span.begin = (tile - table.first_tiles[span.entry]) * kTile;
  // The last tile takes the elements that the others lack for the head.
  span.end = tile + 1 == table.first_tiles[span.entry + 1] ? entry.n : span.begin + kTile;
  span.body = span.begin;
  span.body_end = span.end;
  return span;
}

}  // namespace tvfast::gpu
