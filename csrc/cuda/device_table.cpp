#include "device_table.hpp"

#include <limits>

#include "packing.hpp"
#include "policy.hpp"

namespace tvfast::gpu {

namespace {

// Elements before the first at which `n_bytes` of the view are aligned; -1 if there is none.
int head_of(const void* data, DType dtype, std::size_t n_bytes) {
  const std::size_t size = size_of(dtype);
  const std::size_t past = reinterpret_cast<std::uintptr_t>(data) % n_bytes;
  if (past % size != 0) return -1;
  return static_cast<int>((n_bytes - past) % n_bytes / size);
}

bool is_quads(const View& view, int head) {
  return view.data != nullptr &&
         head_of(view.data, view.dtype, 4 * size_of(view.dtype)) == head % 4;
}

// Leaves every score as it is stored: the product and the sum are exact, and no score is below.
constexpr ScoreMap kAsStored{1.0f, -0.0f, -std::numeric_limits<float>::infinity()};

DeviceScoreMap to_map(const Entry& entry, int k) {
  const ScoreMap& map = entry.score_maps.empty() ? kAsStored : entry.score_maps[k];
  return {map.scale, map.shift, map.floor};
}

struct Arrangement {
  Form form = Form::SINGLES;
  int head = 0;
};

Arrangement arrange(const Entry& entry) {
  std::vector<View> views = entry.models;
  if (entry.base.data != nullptr) views.push_back(entry.base);
  if (entry.out != nullptr) views.push_back({entry.out, entry.out_dtype});
  if (views.empty()) return {};
  const DType dtype = views.front().dtype;
  bool one_type = dtype != DType::F32;
  for (const View& view : views) one_type = one_type && view.dtype == dtype;
  const auto agree = [&](auto&& bytes_of) {
    const int head = head_of(views.front().data, dtype, bytes_of(dtype));
    for (const View& view : views)
      if (head < 0 || head_of(view.data, view.dtype, bytes_of(view.dtype)) != head) return -1;
    return head;
  };
  if (one_type) {
    if (const int head = agree([](DType) { return std::size_t{16}; }); head >= 0)
      return {dtype == DType::BF16 ? Form::PACKED_BF16 : Form::PACKED_F16, head};
  }
  if (const int head = agree([](DType d) { return 4 * size_of(d); }); head >= 0)
    return {Form::QUADS, head};
  return {};
}

}  // namespace

std::vector<std::int64_t> first_tiles_of(const Table& table) {
  std::vector<std::int64_t> first_tiles{0};
  for (const Entry& entry : table.entries) {
    const std::int64_t head = arrange(entry).head;
    const std::int64_t after_head = entry.n > head ? entry.n - head : entry.n > 0 ? 1 : 0;
    first_tiles.push_back(first_tiles.back() + (after_head + kTile - 1) / kTile);
  }
  return first_tiles;
}

PackedTable::PackedTable(const Table& table, const std::vector<const std::uint32_t*>& ranks) {
  n_entries_ = static_cast<std::int32_t>(table.entries.size());
  n_models_ = table.n_models;
  std::vector<DeviceEntry> entries;
  std::vector<DeviceModel> models;
  const std::vector<std::int64_t> first_tiles = first_tiles_of(table);
  for (const Entry& entry : table.entries) {
    const auto [form, head] = arrange(entry);
    const auto to_view = [head = head](const View& view) {
      return DeviceView{view.data, static_cast<std::int32_t>(view.dtype), is_quads(view, head)};
    };
    entries.push_back({to_view(entry.base), entry.out, static_cast<std::int32_t>(entry.out_dtype),
                       form, entry.n, entry.row_length(), entry.offset,
                       entry.group_offset + entry.offset, entry.group, head,
                       entry.origin().data != nullptr});
    for (int k = 0; k < n_models_; ++k) {
      const std::size_t at = models.size();
      models.push_back({to_view(entry.models[k]),
                        entry.scores.empty() ? DeviceView{} : to_view(entry.scores[k]),
                        to_map(entry, k), entry.masks.empty() ? nullptr : entry.masks[k],
                        ranks.empty() ? nullptr : ranks[at]});
    }
  }
  n_tiles_ = first_tiles.back();
  append(bytes_, entries);
  models_at_ = append(bytes_, models);
  tiles_at_ = append(bytes_, first_tiles);
}

DeviceTable PackedTable::at(const void* address) const {
  return {at_bytes<DeviceEntry>(address, 0),
          at_bytes<DeviceModel>(address, models_at_),
          at_bytes<std::int64_t>(address, tiles_at_),
          n_tiles_,
          n_entries_,
          n_models_};
}

PackedScalars::PackedScalars(const Scalars& scalars) {
  append(bytes_, scalars.tensors);
  models_at_ = append(bytes_, scalars.models);
}

DeviceScalars PackedScalars::at(const void* address) const {
  return {at_bytes<TensorScalars>(address, 0), at_bytes<ModelScalars>(address, models_at_)};
}

}  // namespace tvfast::gpu
