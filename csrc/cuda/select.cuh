// What the kernels of select.cu, place.cu and equal.cu share.
#pragma once

#include "keys.cuh"
#include "radix.cuh"

namespace tvfast::gpu {

// One batch of queries, in device memory.
struct DeviceSelection {
  const DeviceQuery* queries;
  const GroupMember* members;
  const std::int32_t *first_queries, *first_members;  // of each group
  QueryState* states;
  Guess* guesses;        // by place, or none are asked for
  std::uint32_t* flags;  // open queries before the pass over the tiles, and before each radix pass
  Count* bins;
  std::uint32_t *samples, *keys;
  SelectionBatch batch;
  Keep keep;
};

// Queries [first, last) of a group that are in the batch.
struct QueryRange {
  std::int32_t first, last;
};

TVFAST_STAGE QueryRange queries_of(const DeviceSelection& s, std::int32_t group) {
  const std::int32_t first = s.first_queries[group], last = s.first_queries[group + 1];
  return {first > s.batch.first ? first : s.batch.first, last < s.batch.last ? last : s.batch.last};
}

// Whether every query of a group has a guess, so that its entries are merged with them.
TVFAST_STAGE bool all_likely(const std::int32_t* first_queries, const DeviceQuery* queries,
                             const Guess* guesses, std::int32_t group) {
  for (std::int32_t q = first_queries[group]; q < first_queries[group + 1]; ++q)
    if (guesses[queries[q].place].likely == 0) return false;
  return true;
}

// The last of ascending places [first, last) that is at or before a place.
template <class PlaceOf>
TVFAST_STAGE std::int32_t last_not_after(std::int32_t first, std::int32_t last, std::int64_t place,
                                         PlaceOf&& place_of) {
  while (last - first > 1) {
    const std::int32_t middle = first + (last - first) / 2;
    if (place_of(middle) <= place) {
      first = middle;
    } else {
      last = middle;
    }
  }
  return first;
}

}  // namespace tvfast::gpu
