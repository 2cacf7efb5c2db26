// Counting and finding keys of known value on a device: the queries as its kernels read them. Host
// only and pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "select_plan.hpp"

namespace tvfast::gpu {

struct DeviceEqual {
  std::int64_t r;         // 0-based, among the keys that equal `key`, by position
  std::int64_t tiles_at;  // counts of the group's tiles, by position
  std::int64_t n_tiles;
  std::int32_t group, model;
  std::uint32_t key;
  std::int32_t place;  // in the caller's list
};

// Where the r-th equal key is; -1 if there are only n_equal <= r.
struct EqualAnswer {
  std::int64_t position, n_equal;
};

// Places in the workspace, in bytes.
struct EqualLayout {
  std::size_t answers = 0, tiles = 0, entries = 0, total = 0;
};

class PackedEquals {
 public:
  // `by_entry`: whether equal keys of every entry are asked for; they take 8 bytes for each entry
  // and query.
  PackedEquals(const Table& table, Keep keep, const std::vector<EqualQuery>& queries,
               bool by_entry);

  const std::vector<std::byte>& bytes() const { return bytes_; }
  Keep keep() const { return keep_; }
  std::int32_t n_queries() const { return n_queries_; }
  std::int32_t n_entries() const { return n_entries_; }
  bool by_entry() const { return by_entry_; }
  const EqualLayout& layout() const { return layout_; }
  std::size_t members_at() const { return members_at_; }
  std::size_t places_at() const { return places_at_; }
  std::size_t first_queries_at() const { return first_queries_at_; }
  std::size_t first_members_at() const { return first_members_at_; }

 private:
  Keep keep_;
  std::int32_t n_queries_, n_entries_;
  bool by_entry_;
  EqualLayout layout_;
  std::vector<std::byte> bytes_;
  std::size_t members_at_ = 0, places_at_ = 0, first_queries_at_ = 0, first_members_at_ = 0;
};

}  // namespace tvfast::gpu
