// Blocks of 8-bit codes with factors: which factor belongs to which run of elements.
#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "api.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace tvfast {

namespace {

constexpr std::int64_t kTile = 1 << 16;  // elements a thread widens at a time

float from_half(std::uint16_t half) {
  const std::uint32_t rest = half & 0x7fffu;
  const std::uint32_t special = rest >= 0x7c00u ? 0x7f800000u : 0u;
  const float value = std::bit_cast<float>(rest << 13) * 0x1p112f;
  const std::uint32_t bits = special ? (rest << 13) | special : std::bit_cast<std::uint32_t>(value);
  return std::bit_cast<float>(bits | (half & 0x8000u) << 16);
}

float from_exponent(std::uint8_t exponent) {
  if (exponent == 0xff) return std::bit_cast<float>(0x7fc00000u);
  return std::bit_cast<float>(exponent == 0 ? 0x00400000u : std::uint32_t{exponent} << 23);
}

float load_factor(const void* scales, ScaleType type, std::int64_t i) {
  const auto* p =
      static_cast<const unsigned char*>(scales) + i * static_cast<std::int64_t>(size_of(type));
  std::uint32_t word = 0;
  std::memcpy(&word, p, size_of(type));
  switch (type) {
    case ScaleType::F32: return std::bit_cast<float>(word);
    case ScaleType::BF16: return std::bit_cast<float>(word << 16);
    case ScaleType::F16: return from_half(static_cast<std::uint16_t>(word));
    case ScaleType::E8M0: return from_exponent(static_cast<std::uint8_t>(word));
  }
  return 0.0f;
}

// The nearest float16 of a positive number, the largest finite one at most.
std::uint16_t half_of(float x) {
  if (x >= 65504.0f) return 0x7bffu;
  if (x < 0x1p-14f) return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x + 0.5f));
  const std::uint32_t a = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>((a + 0xfffu - (112u << 23) + ((a >> 13) & 1u)) >> 13);
}

// The least power of two that is not below a positive number; E8M0's least is 2^-127.
std::uint8_t exponent_of(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if (bits <= 0x00400000u) return 0;
  const std::uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u);
  return static_cast<std::uint8_t>(std::min(exponent, 254u));
}

// Stores the factor of a block and returns it as it will be read; never zero or infinite.
float store_factor(float exact, ScaleType type, bool power_of_two, void* scales, std::int64_t i) {
  auto* p = static_cast<unsigned char*>(scales) + i * static_cast<std::int64_t>(size_of(type));
  if (power_of_two || type == ScaleType::E8M0) exact = from_exponent(exponent_of(exact));
  std::uint32_t word = std::bit_cast<std::uint32_t>(exact);
  switch (type) {
    case ScaleType::F32: break;
    case ScaleType::BF16:
      word = std::clamp<std::uint32_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16, 1u, 0x7f7fu);
      break;
    case ScaleType::F16: word = std::max<std::uint32_t>(half_of(exact), 1u); break;
    case ScaleType::E8M0: word = exponent_of(exact); break;
  }
  std::memcpy(p, &word, size_of(type));
  return load_factor(scales, type, i);
}

float largest_of(Fp8 format) { return format == Fp8::E4M3 ? 448.0f : 57344.0f; }

// Rows of elements [begin, end): fn(matrix row counted over all matrices, first, one past the last
// column, index of the first element).
template <class Fn>
void for_each_row(std::int64_t begin, std::int64_t end, std::int64_t n_columns, Fn&& fn) {
  while (begin < end) {
    const std::int64_t row = begin / n_columns, column = begin % n_columns;
    const std::int64_t n = std::min(n_columns - column, end - begin);
    fn(row, column, column + n, begin);
    begin += n;
  }
}

// fn(block column, first, one past the last column) for the blocks of a row.
template <class Fn>
void for_each_run(std::int64_t column, std::int64_t end, std::int64_t block_columns, Fn&& fn) {
  while (column < end) {
    const std::int64_t block = column / block_columns;
    const std::int64_t stop = std::min(end, (block + 1) * block_columns);
    fn(block, column, stop);
    column = stop;
  }
}

std::int64_t block_row(const ScaledBlocks& blocks, std::int64_t row) {
  return row / blocks.n_rows * blocks.blocks_down() + row % blocks.n_rows / blocks.block_rows;
}

}  // namespace

void widen_scaled(const ScaledBlocks& blocks, const void* codes, const void* scales,
                  std::int64_t first_row, std::int64_t begin, std::int64_t end, float* out,
                  const Options& options) {
  const Kernels& kernels = kernels_for(options.isa);
  const auto* p = static_cast<const std::uint8_t*>(codes);
  const std::int64_t n_tiles = (end - begin + kTile - 1) / kTile;
  const int n_threads = parallel_threads(n_tiles, options.n_threads);
  parallel_for(n_tiles, n_threads, [&](std::int64_t tile, int) {
    const std::int64_t from = begin + tile * kTile, to = std::min(end, from + kTile);
    for_each_row(
        from, to, blocks.n_columns,
        [&](std::int64_t row, std::int64_t column, std::int64_t stop, std::int64_t i) {
          const std::int64_t at = (block_row(blocks, row) - first_row) * blocks.blocks_across();
          const std::int64_t shift = i - begin - column;
          for_each_run(column, stop, blocks.block_columns,
                       [&](std::int64_t block, std::int64_t c, std::int64_t c_end) {
                         kernels.widen_fp8(p + shift + c, c_end - c, blocks.format,
                                           load_factor(scales, blocks.scale_type, at + block),
                                           out + shift + c);
                       });
        });
  });
}

void narrow_scaled(const ScaledBlocks& blocks, const float* values, std::int64_t begin,
                   std::int64_t end, bool power_of_two, void* codes, void* scales,
                   const Options& options) {
  const Kernels& kernels = kernels_for(options.isa);
  auto* p = static_cast<std::uint8_t*>(codes);
  const std::int64_t across = blocks.blocks_across(), n_columns = blocks.n_columns;
  if (begin >= end) return;
  const std::int64_t first = block_row(blocks, begin / n_columns);
  const std::int64_t last = block_row(blocks, (end - 1) / n_columns) + 1;
  const std::int64_t n_tasks = (last - first) * across;
  const int n_threads = parallel_threads(n_tasks, options.n_threads);
  parallel_for(n_tasks, n_threads, [&](std::int64_t task, int) {
    const std::int64_t at = first + task / across, block = task % across;
    const std::int64_t matrix = at / blocks.blocks_down();
    const std::int64_t row = matrix * blocks.n_rows + at % blocks.blocks_down() * blocks.block_rows;
    const std::int64_t row_end =
        std::min({row + blocks.block_rows, (matrix + 1) * blocks.n_rows, end / n_columns});
    const std::int64_t column = block * blocks.block_columns;
    const std::int64_t n = std::min(blocks.block_columns, n_columns - column);
    float most = 0.0f;
    for (std::int64_t r = row; r < row_end; ++r)
      most = std::max(most, kernels.largest_finite(values + r * n_columns + column - begin, n));
    const float exact = most == 0.0f ? 1.0f : most / largest_of(blocks.format);
    const float factor =
        store_factor(exact == 0.0f ? 1.0f : exact, blocks.scale_type, power_of_two, scales, task);
    for (std::int64_t r = row; r < row_end; ++r) {
      const std::int64_t i = r * n_columns + column - begin;
      kernels.narrow_fp8(values + i, n, blocks.format, factor, true, p + i);
    }
  });
}

void widen_fp8(const void* codes, std::int64_t n, Fp8 format, float* out) {
  kernels_for("").widen_fp8(static_cast<const std::uint8_t*>(codes), n, format, 1.0f, out);
}

void narrow_fp8(const float* values, std::int64_t n, Fp8 format, bool saturate, void* codes) {
  kernels_for("").narrow_fp8(values, n, format, 1.0f, saturate, static_cast<std::uint8_t*>(codes));
}

}  // namespace tvfast
