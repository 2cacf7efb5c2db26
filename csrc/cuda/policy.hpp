// Launch shapes. Chosen from register counts and byte counts; not yet measured on a device.
#pragma once

#include <cstdint>

namespace tvfast::gpu {

// Elements of a tile: eight 16-byte packets of 16-bit storage for each thread of a block, so that
// the search for a tile's entry is rare.
inline constexpr std::int64_t kTile = std::int64_t{1} << 14;

inline constexpr int kThreads = 256;

// Blocks of a streaming kernel that share a multiprocessor: 4 of 256 threads leave 64 registers
// each, and keep 4 * 256 * 16 bytes in flight for every tensor that is read.
inline constexpr int kBlocksPerMultiprocessor = 4;

}  // namespace tvfast::gpu
