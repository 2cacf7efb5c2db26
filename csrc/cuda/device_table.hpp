// The work table in device memory: what kernels read of every entry, and where tiles begin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../core/queries.hpp"
#include "../core/table.hpp"

namespace tvfast::gpu {

// How the threads of a tile take an entry's elements. PACKED: 16 bytes of one 16-bit type, eight
// elements; QUADS: four elements of any types with one load for each tensor; SINGLES: four elements
// with a load for each, where the addresses allow no more.
enum class Form : std::int32_t { PACKED_BF16 = 0, PACKED_F16 = 1, QUADS = 2, SINGLES = 3 };

struct DeviceView {
  const void* data;
  std::int32_t dtype;  // DType
  std::int32_t quads;  // whether four elements from `head` on are one aligned load
};

// How a stored score is read, as `ScoreMap`, before its magnitude is taken. Without initial values,
// for shared memory.
struct DeviceScoreMap {
  float scale, shift, floor;
};

struct DeviceModel {
  DeviceView model, score;
  DeviceScoreMap map;
  const std::uint64_t* mask;
  const std::uint32_t* ranks;  // of the row, for the stages that rank
};

struct DeviceEntry {
  DeviceView base;  // data == nullptr: none
  void* out;
  std::int32_t out_dtype;
  Form form;
  std::int64_t n, row, offset, position;  // position of element 0 in its group
  std::int32_t group;
  std::int32_t head;       // elements before the first aligned one
  std::int32_t subtracts;  // whether the base is, from the models
};

// Addresses in device memory.
struct DeviceTable {
  const DeviceEntry* entries;
  const DeviceModel* models;        // [n_entries * n_models]
  const std::int64_t* first_tiles;  // [n_entries + 1], ascending
  std::int64_t n_tiles;
  std::int32_t n_entries, n_models;
};

struct DeviceScalars {
  const TensorScalars* tensors;  // [n_entries]
  const ModelScalars* models;    // [n_entries * n_models]
};

// Tiles before each entry, and those of all.
std::vector<std::int64_t> first_tiles_of(const Table& table);

// A table packed into one piece of memory that is copied to the device as it is. Entries without
// elements stay in it; they have no tiles.
class PackedTable {
 public:
  // `ranks` [n_entries * n_models] addresses of device memory, or empty.
  explicit PackedTable(const Table& table, const std::vector<const std::uint32_t*>& ranks = {});

  const std::vector<std::byte>& bytes() const { return bytes_; }
  DeviceTable at(const void* address) const;

 private:
  std::vector<std::byte> bytes_;
  std::size_t models_at_ = 0, tiles_at_ = 0;
  std::int64_t n_tiles_ = 0;
  std::int32_t n_entries_ = 0, n_models_ = 0;
};

class PackedScalars {
 public:
  explicit PackedScalars(const Scalars& scalars);

  const std::vector<std::byte>& bytes() const { return bytes_; }
  DeviceScalars at(const void* address) const;

 private:
  std::vector<std::byte> bytes_;
  std::size_t models_at_ = 0;
};

}  // namespace tvfast::gpu
