// Ranks of magnitudes within rows: a stable radix sort of each row by one block, in the caller's
// workspace. A digit that all keys of a row share is not sorted by: differences of 16-bit weights
// mostly leave half of the digits empty.
#include <algorithm>

#include "api.hpp"
#include "keeping.cuh"
#include "packing.hpp"
#include "tiles.cuh"

namespace tvfast::gpu {

namespace {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kPasses = 4;
constexpr int kRankWarps = kThreads / 32;
static_assert(kDigits == kThreads, "a thread for each digit");

struct Sorting {
  unsigned before[kDigits];               // keys of the chunks before, and of lower digits
  unsigned of_warp[kRankWarps][kDigits];  // keys of one chunk, by warp
  unsigned scan[kDigits];
};

struct RowOf {
  const DeviceEntry& entry;
  const DeviceModel& model;
  std::int64_t begin;
  unsigned n;
};

TVFAST_STAGE U key_at(const RowOf& row, unsigned i) {
  F tau = load_one(row.model.model, row.begin + i);
  if (row.entry.subtracts) tau = tau - load_one(row.entry.base, row.begin + i);
  const U key = bits(magnitude(tau));
  return key < kNanKey ? key : kNanKey;
}

// Exclusive sums of counts [kDigits], one a thread, in place.
TVFAST_STAGE void exclusive_sums(unsigned* counts, unsigned* scratch) {
  const int t = static_cast<int>(threadIdx.x);
  const unsigned own = counts[t];
  unsigned sum = own;
  for (int by = 1; by < kDigits; by *= 2) {
    scratch[t] = sum;
    __syncthreads();
    if (t >= by) sum += scratch[t - by];
    __syncthreads();
  }
  counts[t] = sum - own;
  __syncthreads();
}

// Sorts by one digit, from `key` in the present order to `put` in the next; false, and nothing is
// put, if all keys have the same digit and `must` is not set.
template <class Key, class Put>
TVFAST_STAGE bool sort_by_digit(Sorting& s, unsigned n, int shift, bool must, Key&& key,
                                Put&& put) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  s.before[t] = 0;
  __syncthreads();
  for (unsigned i = static_cast<unsigned>(t); i < n; i += kThreads)
    atomicAdd(&s.before[key(i) >> shift & (kDigits - 1)], 1u);
  __syncthreads();
  const bool one_digit = s.before[key(0) >> shift & (kDigits - 1)] == n;
  __syncthreads();
  if (one_digit && !must) return false;
  exclusive_sums(s.before, s.scan);
  for (unsigned start = 0; start < n; start += kThreads) {
    for (int w = 0; w < kRankWarps; ++w) s.of_warp[w][t] = 0;
    __syncthreads();
    const unsigned i = start + static_cast<unsigned>(t);
    const bool inside = i < n;
    const U own = inside ? key(i) : 0u;
    // A digit of its own for threads past the end, so that they match nobody.
    const unsigned digit = inside ? own >> shift & (kDigits - 1) : kDigits;
    const unsigned same = __match_any_sync(0xffffffffu, digit);
    const unsigned lower = __popc(same & ((1u << (t % 32)) - 1u));
    if (inside && lower == 0) s.of_warp[warp][digit] = __popc(same);
    __syncthreads();
    if (inside) {
      unsigned place = s.before[digit] + lower;
      for (int w = 0; w < warp; ++w) place += s.of_warp[w][digit];
      put(i, own, place);
    }
    __syncthreads();
    for (int w = 0; w < kRankWarps; ++w) s.before[t] += s.of_warp[w][t];
    __syncthreads();
  }
  return true;
}

// Ranks of one row: `pairs` [2][n] are (key, index) in the two orders.
TVFAST_STAGE void rank_row(Sorting& s, const RowOf& row, unsigned long long* pairs, U* ranks) {
  unsigned long long* from = pairs;
  unsigned long long* to = pairs + row.n;
  bool sorted = false;
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = kDigitBits * pass;
    const auto put = [&](unsigned long long pair, unsigned place) { to[place] = pair; };
    const bool moved =
        sorted
            ? sort_by_digit(
                  s, row.n, shift, false, [&](unsigned i) { return static_cast<U>(from[i] >> 32); },
                  [&](unsigned i, U, unsigned place) { put(from[i], place); })
            : sort_by_digit(
                  s, row.n, shift, pass + 1 == kPasses, [&](unsigned i) { return key_at(row, i); },
                  [&](unsigned i, U key, unsigned place) {
                    put(static_cast<unsigned long long>(key) << 32 | i, place);
                  });
    if (!moved) continue;
    sorted = true;
    unsigned long long* const old = from;
    from = to;
    to = old;
  }
  for (unsigned i = threadIdx.x; i < row.n; i += kThreads)
    ranks[row.begin + static_cast<U>(from[i])] = i;
  __syncthreads();
}

// Blocks take the rows of all entries and models in turn; first_rows [n_entries + 1].
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    ranks_kernel(DeviceTable table, const std::int64_t* first_rows, unsigned long long* pairs,
                 std::int64_t longest) {
  alignas(16) __shared__ unsigned char storage[sizeof(Sorting)];
  Sorting& sorting = *reinterpret_cast<Sorting*>(storage);
  const std::int64_t n_rows = first_rows[table.n_entries];
  DeviceTable rows = table;
  rows.first_tiles = first_rows;
  for (std::int64_t at = blockIdx.x; at < n_rows * table.n_models; at += gridDim.x) {
    const std::int64_t number = at / table.n_models;
    const int k = static_cast<int>(at % table.n_models);
    const std::int32_t e = find_entry(rows, number);
    const DeviceEntry& entry = table.entries[e];
    const DeviceModel& model = table.models[std::int64_t{e} * table.n_models + k];
    const std::int64_t begin = (number - first_rows[e]) * entry.row;
    const std::int64_t left = entry.n - begin;
    const RowOf row{entry, model, begin,
                    static_cast<unsigned>(left < entry.row ? left : entry.row)};
    rank_row(sorting, row, pairs + 2 * longest * blockIdx.x, const_cast<U*>(model.ranks));
  }
}

std::int64_t rank_blocks(std::int64_t n_rows, int n_models, std::int64_t longest, Place place) {
  const std::int64_t at_once = blocks_at_once(ranks_kernel, kThreads, place);
  // Long rows: fewer at once, so that the workspace stays within kRankBytes or holds one row.
  const std::int64_t fitting =
      kRankBytes / (2 * longest * static_cast<std::int64_t>(sizeof(unsigned long long)));
  return std::min({n_rows * n_models, at_once, std::max<std::int64_t>(1, fitting)});
}

}  // namespace

RankPlan rank_plan(const Table& table, Place place) {
  const OnDevice current(place.device);
  RankPlan plan;
  std::vector<std::int64_t> first_rows{0};
  for (const Entry& entry : table.entries) {
    const std::int64_t row = entry.n > 0 ? std::min(entry.row_length(), entry.n) : 0;
    plan.longest = std::max(plan.longest, row);
    first_rows.push_back(first_rows.back() + (row > 0 ? (entry.n + row - 1) / row : 0));
  }
  append(plan.first_rows, first_rows);
  if (plan.longest == 0) return plan;
  plan.n_blocks = rank_blocks(first_rows.back(), table.n_models, plan.longest, place);
  plan.n_workspace = static_cast<std::size_t>(plan.n_blocks) * 2 *
                     static_cast<std::size_t>(plan.longest) * sizeof(unsigned long long);
  return plan;
}

void rank_rows(const DeviceTable& table, const RankPlan& plan, const void* at, void* workspace,
               Place place) {
  const OnDevice current(place.device);
  launch(ranks_kernel, plan.n_blocks, kThreads, place, table, at_bytes<std::int64_t>(at, 0),
         at_bytes<unsigned long long>(workspace, 0), plan.longest);
}

}  // namespace tvfast::gpu
