// score and kron: importance accumulated in place, per-sample scores of layers in factored form,
// block-diagonal Kronecker products, and the epilogue of products that were multiplied elsewhere.
#include <algorithm>
#include <cstring>

#include "api.hpp"
#include "multiply.cuh"
#include "packing.hpp"
#include "sums.cuh"
#include "tiles.cuh"

namespace tvfast::gpu {

namespace {

// Blocks of the product kernels that share a multiprocessor. A thread has 64 chains, so that few
// threads are enough to keep the arithmetic busy; a layer's tiles fill 41 KiB of shared memory.
constexpr int kKronBlocks = 6;
constexpr int kFactoredBlocks = 4;

struct DeviceSample {
  DeviceView gradients, activations;
  std::int64_t n_tokens;
  float weight;
  std::int32_t unused;
};

struct DeviceFactoredScore {
  DeviceView model, base;
  F* out;
  std::int64_t n_out, n_in;
  std::int32_t bias_column, n_samples;
};

struct DeviceBlocks {
  const DeviceView* blocks;
  std::int64_t side, block, n_blocks;
  std::int32_t packed;
};

struct DeviceKronecker {
  DeviceView x;
  void* out;
  std::int32_t out_dtype, accumulate;
  std::int64_t n_out, n_in;
  DeviceBlocks a, b;
  float scale;
};

// score

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    score_kernel(DeviceTable table, DeviceScalars scalars) {
  for (std::int64_t tile = blockIdx.x; tile < table.n_tiles; tile += gridDim.x) {
    const TileSpan span = span_of(table, tile);
    const DeviceEntry& entry = table.entries[span.entry];
    const std::int64_t first_model = std::int64_t{span.entry} * table.n_models;
    const DeviceModel* models = table.models + first_model;
    const ModelScalars* own = scalars.models + first_model;
    const DeviceView out{entry.out, entry.out_dtype, entry.form != Form::SINGLES};
    const auto one_quad = [&](std::int64_t i, int n, bool whole) {
      F total[kQuad], base[kQuad] = {};
      load_quad(out, i, n, whole, total);
      if (entry.subtracts) load_quad(entry.base, i, n, whole, base);
      for (int k = 0; k < table.n_models; ++k) {
        F model[kQuad], gradient[kQuad];
        load_quad(models[k].model, i, n, whole, model);
        load_quad(models[k].score, i, n, whole, gradient);
        const F weight = own[k].weight;
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
          const F tau = entry.subtracts ? model[e] - base[e] : model[e];
          total[e] = total[e] + magnitude(gradient[e] * tau) * weight;
        }
      }
      store_quad(entry.out, entry.out_dtype, i, n, whole, total);
    };
    for_each_quad(entry, span, one_quad);
    for_each_edge(span, one_quad);
  }
}

// A tile of a layer over all samples: the accumulator and theta stay in shared memory, where a
// thread meets its own elements alone, and a sample's gradient in registers.
__global__ void __launch_bounds__(kProductThreads, kFactoredBlocks)
    factored_kernel(DeviceFactoredScore score, const DeviceSample* samples) {
  __shared__ Slabs slabs;
  __shared__ F taus[kSide][kSide], totals[kSide][kSide];
  const Own own;
  const std::int64_t n_across = (score.n_in + kSide - 1) / kSide;
  const std::int64_t n_tiles = (score.n_out + kSide - 1) / kSide * n_across;
  const std::int64_t n_stored = score.n_in - score.bias_column;
  for (std::int64_t tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
    const std::int64_t row = tile / n_across * kSide, column = tile % n_across * kSide;
    const bool square = score.model.data == nullptr;
    const auto inside = [&](int m, int n) {
      return row + m < score.n_out && column + n < score.n_in;
    };
#pragma unroll 1
    for (int m = 0; m < kOwn; ++m)
#pragma unroll 1
      for (int n = 0; n < kOwn; ++n) {
        const int at_m = own.row(m), at_n = own.column(n);
        const std::int64_t i = (row + at_m) * score.n_in + column + at_n;
        totals[at_m][at_n] = inside(at_m, at_n) ? score.out[i] : 0.0f;
        if (square) continue;
        F tau = inside(at_m, at_n) ? load_one(score.model, i) : 0.0f;
        if (score.base.data != nullptr && inside(at_m, at_n)) tau = tau - load_one(score.base, i);
        taus[at_m][at_n] = tau;
      }
#pragma unroll 1
    for (int j = 0; j < score.n_samples; ++j) {
      const DeviceSample& sample = samples[j];
      F g[kOwn][kOwn];
      clear(g);
      multiply<Left::ROWS>(
          slabs, sample.n_tokens,
          [&](int m, std::int64_t token) {
            return row + m < score.n_out ? load_one(sample.gradients, token * score.n_out + row + m)
                                         : 0.0f;
          },
          [&](std::int64_t token, int n) {
            if (column + n >= n_stored) return column + n < score.n_in ? 1.0f : 0.0f;
            return load_one(sample.activations, token * n_stored + column + n);
          },
          g);
#pragma unroll
      for (int m = 0; m < kOwn; ++m)
#pragma unroll
        for (int n = 0; n < kOwn; ++n) {
          const F factor = square ? g[m][n] : taus[own.row(m)][own.column(n)];
          F& total = totals[own.row(m)][own.column(n)];
          total = total + magnitude(g[m][n] * factor) * sample.weight;
        }
    }
#pragma unroll 1
    for (int m = 0; m < kOwn; ++m)
#pragma unroll 1
      for (int n = 0; n < kOwn; ++n) {
        const int at_m = own.row(m), at_n = own.column(n);
        if (inside(at_m, at_n))
          reinterpret_cast<std::uint32_t*>(score.out)[(row + at_m) * score.n_in + column + at_n] =
              quiet(totals[at_m][at_n]);
      }
  }
}

// kron

struct DotSlots {
  unsigned long long* limbs;  // [kWindows][kLimbs]
  double* nonfinite;
  unsigned* used;
};

TVFAST_STAGE void add_to_dot(const DotSlots& slots, const ThreadSum& own) {
  const WindowedSum sum = join_warp(own);
  const bool any = __any_sync(0xffffffffu, own.nonfinite != 0.0);
  double nonfinite = own.nonfinite;
  if (any) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) nonfinite += __shfl_xor_sync(0xffffffffu, nonfinite, by);
  }
  if (threadIdx.x % 32 != 0) return;
  add_to_slots(slots.limbs, slots.used, sum);
  if (any) atomicAdd(slots.nonfinite, nonfinite);
}

TVFAST_STAGE F diagonal_element(const DeviceBlocks& factor, const DeviceView& block, int size,
                                std::int64_t m, std::int64_t k) {
  if (factor.packed == 0) return load_one(block, m * size + k);
  const std::int64_t high = m > k ? m : k, low = m > k ? k : m;
  return load_one(block, high * (high + 1) / 2 + low);
}

TVFAST_STAGE int size_of_block(const DeviceBlocks& factor, std::int64_t i) {
  const std::int64_t left_over = factor.side - i * factor.block;
  return static_cast<int>(left_over < factor.block ? left_over : factor.block);
}

// Writes scale * p, or adds it to what is there.
TVFAST_STAGE void put_product(void* out, int dtype, std::int64_t i, F p, F scale, bool accumulate) {
  F result = p * scale;
  if (accumulate) result = load_one({out, dtype, 0}, i) + result;
  store_one(out, dtype, i, result);
}

// One block of B with one of A: T = X A into the block's workspace, then P = B T.
__global__ void __launch_bounds__(kProductThreads, kKronBlocks)
    kron_kernel(DeviceKronecker product, F* workspace, DotSlots dot) {
  __shared__ Slabs slabs;
  const Own own;
  F* const t = workspace + std::int64_t{kLargestBlock} * kLargestBlock * blockIdx.x;
  const std::int64_t n_pairs = product.b.n_blocks * product.a.n_blocks;
  ThreadSum sum;
  for (std::int64_t pair = blockIdx.x; pair < n_pairs; pair += gridDim.x) {
    const std::int64_t b = pair / product.a.n_blocks, a = pair % product.a.n_blocks;
    const std::int64_t row = b * product.b.block, column = a * product.a.block;
    const int n_rows = size_of_block(product.b, b), n_columns = size_of_block(product.a, a);
    const auto x = [&](std::int64_t m, std::int64_t n) {
      return load_one(product.x, (row + m) * product.n_in + column + n);
    };
    for (int m0 = 0; m0 < n_rows; m0 += kSide)
      for (int n0 = 0; n0 < n_columns; n0 += kSide) {
        F c[kOwn][kOwn];
        clear(c);
        multiply<Left::STEPS>(
            slabs, n_columns,
            [&](int m, std::int64_t k) { return m0 + m < n_rows ? x(m0 + m, k) : 0.0f; },
            [&](std::int64_t k, int n) {
              return n0 + n < n_columns
                         ? diagonal_element(product.a, product.a.blocks[a], n_columns, k, n0 + n)
                         : 0.0f;
            },
            c);
#pragma unroll
        for (int m = 0; m < kOwn; ++m)
#pragma unroll
          for (int n = 0; n < kOwn; ++n)
            t[(m0 + own.row(m)) * kLargestBlock + n0 + own.column(n)] = c[m][n];
      }
    __syncthreads();
    for (int m0 = 0; m0 < n_rows; m0 += kSide)
      for (int n0 = 0; n0 < n_columns; n0 += kSide) {
        F c[kOwn][kOwn];
        clear(c);
        multiply<Left::STEPS>(
            slabs, n_rows,
            [&](int m, std::int64_t k) {
              return m0 + m < n_rows
                         ? diagonal_element(product.b, product.b.blocks[b], n_rows, m0 + m, k)
                         : 0.0f;
            },
            [&](std::int64_t k, int n) { return t[k * kLargestBlock + n0 + n]; }, c);
#pragma unroll
        for (int m = 0; m < kOwn; ++m) {
#pragma unroll
          for (int n = 0; n < kOwn; n += kQuad) {
            double addends[kQuad];
#pragma unroll
            for (int e = 0; e < kQuad; ++e) {
              const int at_m = m0 + own.row(m), at_n = n0 + own.column(n + e);
              const bool inside = at_m < n_rows && at_n < n_columns;
              const F p = c[m][n + e];
              addends[e] =
                  inside ? static_cast<double>(x(at_m, at_n)) * static_cast<double>(p) : 0.0;
              if (inside && product.out != nullptr)
                put_product(product.out, product.out_dtype,
                            (row + at_m) * product.n_in + column + at_n, p, product.scale,
                            product.accumulate != 0);
            }
            add_quad(sum, addends);
          }
        }
      }
    // The joined sums are exact in 64 bits; a thread's own, in float64, must not grow too long.
    add_to_dot(dot, sum);
    sum = ThreadSum{};
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(ProductPanel panel, DotSlots dot) {
  ThreadSum sum;
  const DeviceView x{panel.x.data, static_cast<std::int32_t>(panel.x.dtype), 0};
  const std::int64_t n_quads = (panel.n_columns + kQuad - 1) / kQuad;
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  int n_added = 0;
  const std::int64_t n = panel.n_rows * n_quads;
  // Every thread goes through the loop equally often: joining takes a whole warp.
  for (std::int64_t first = std::int64_t{blockIdx.x} * blockDim.x; first < n; first += stride) {
    const std::int64_t at = first + threadIdx.x;
    if (at < n) {
      const std::int64_t row = at / n_quads, column = at % n_quads * kQuad;
      double addends[kQuad];
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        addends[e] = 0.0;
        if (column + e >= panel.n_columns) continue;
        const F p = panel.product[row * panel.product_stride + column + e];
        addends[e] = static_cast<double>(load_one(x, row * panel.x_stride + column + e)) *
                     static_cast<double>(p);
        if (panel.out != nullptr)
          put_product(panel.out, static_cast<int>(panel.out_dtype),
                      row * panel.out_stride + column + e, p, panel.scale, panel.accumulate);
      }
      add_quad(sum, addends);
    }
    if (++n_added == kAddendsOfThread / kQuad) {
      add_to_dot(dot, sum);
      sum = ThreadSum{};
      n_added = 0;
    }
  }
  add_to_dot(dot, sum);
}

DotSlots slots_at(void* at) {
  auto* const bytes = static_cast<unsigned char*>(at);
  return {reinterpret_cast<unsigned long long*>(bytes),
          reinterpret_cast<double*>(bytes + kWindows * kLimbs * sizeof(unsigned long long)),
          reinterpret_cast<unsigned*>(bytes + kWindows * kLimbs * sizeof(unsigned long long) +
                                      sizeof(double))};
}

std::vector<DeviceView> to_views(const std::vector<View>& views) {
  std::vector<DeviceView> result;
  for (const View& view : views)
    result.push_back({view.data, static_cast<std::int32_t>(view.dtype), 0});
  return result;
}

DeviceView to_view(const View& view) {
  return {view.data, static_cast<std::int32_t>(view.dtype), 0};
}

std::int64_t kron_grid(const KroneckerProduct& product, Place place) {
  return std::min(product.a.n_blocks() * product.b.n_blocks(),
                  blocks_at_once(kron_kernel, kProductThreads, place));
}

}  // namespace

void score(const DeviceTable& table, const DeviceScalars& scalars, Place place) {
  const OnDevice current(place.device);
  launch_tiles(score_kernel, table, place, scalars);
}

std::size_t score_factored_workspace(const FactoredScore& score) {
  return aligned(score.samples.size() * sizeof(DeviceSample));
}

void score_factored(const FactoredScore& score, void* workspace, Place place) {
  const OnDevice current(place.device);
  std::vector<DeviceSample> samples;
  for (const FactoredSample& one : score.samples)
    samples.push_back(
        {to_view(one.gradients), to_view(one.activations), one.n_tokens, one.weight, 0});
  copy_to_device(workspace, samples.data(), samples.size() * sizeof(DeviceSample), place);
  const DeviceFactoredScore own{to_view(score.model),
                                to_view(score.base),
                                score.out,
                                score.n_out,
                                score.n_in,
                                score.bias_column ? 1 : 0,
                                static_cast<std::int32_t>(samples.size())};
  const std::int64_t n_tiles =
      (score.n_out + kSide - 1) / kSide * ((score.n_in + kSide - 1) / kSide);
  launch(factored_kernel,
         std::min(n_tiles, blocks_at_once(factored_kernel, kProductThreads, place)),
         kProductThreads, place, own, static_cast<const DeviceSample*>(workspace));
}

std::size_t kron_workspace(const KroneckerProduct& product, Place place) {
  const OnDevice current(place.device);
  return aligned(product.a.blocks.size() * sizeof(DeviceView)) +
         aligned(product.b.blocks.size() * sizeof(DeviceView)) +
         static_cast<std::size_t>(kron_grid(product, place)) * kLargestBlock * kLargestBlock *
             sizeof(float);
}

void kron(const KroneckerProduct& product, void* workspace, void* dot, Place place) {
  const OnDevice current(place.device);
  auto* const bytes = static_cast<unsigned char*>(workspace);
  const std::vector<DeviceView> a = to_views(product.a.blocks), b = to_views(product.b.blocks);
  const std::size_t b_at = aligned(a.size() * sizeof(DeviceView));
  const std::size_t t_at = b_at + aligned(b.size() * sizeof(DeviceView));
  copy_to_device(bytes, a.data(), a.size() * sizeof(DeviceView), place);
  copy_to_device(bytes + b_at, b.data(), b.size() * sizeof(DeviceView), place);
  const auto to_blocks = [](const BlockDiagonal& factor, const void* views) {
    return DeviceBlocks{static_cast<const DeviceView*>(views), factor.side, factor.block,
                        factor.n_blocks(), factor.packed ? 1 : 0};
  };
  const DeviceKronecker own{to_view(product.x),
                            product.out,
                            static_cast<std::int32_t>(product.out_dtype),
                            product.accumulate ? 1 : 0,
                            product.n_out,
                            product.n_in,
                            to_blocks(product.a, bytes),
                            to_blocks(product.b, bytes + b_at),
                            product.scale};
  launch(kron_kernel, kron_grid(product, place), kProductThreads, place, own,
         reinterpret_cast<F*>(bytes + t_at), slots_at(dot));
}

void finish_product(const ProductPanel& panel, void* dot, Place place) {
  const OnDevice current(place.device);
  const std::int64_t n_quads = panel.n_rows * ((panel.n_columns + kQuad - 1) / kQuad);
  launch(
      finish_kernel,
      std::min((n_quads + kThreads - 1) / kThreads, blocks_at_once(finish_kernel, kThreads, place)),
      kThreads, place, panel, slots_at(dot));
}

static_assert(kDotBytes >=
              kWindows * kLimbs * sizeof(unsigned long long) + sizeof(double) + sizeof(unsigned));

double dot_value(const void* host_copy) {
  const auto* const bytes = static_cast<const unsigned char*>(host_copy);
  unsigned long long limbs[kWindows * kLimbs];
  double nonfinite;
  unsigned used;
  std::memcpy(limbs, bytes, sizeof limbs);
  std::memcpy(&nonfinite, bytes + sizeof limbs, sizeof nonfinite);
  std::memcpy(&used, bytes + sizeof limbs + sizeof nonfinite, sizeof used);
  return total(limbs, used, nonfinite).value();
}

}  // namespace tvfast::gpu
