// Products of tiles in shared memory. C(m, n) is a chain over k ascending, one fused multiply-add a
// step, from +0: docs/numerics.md, "Products". Tiles and slabs change which elements are computed
// together, never a chain.
#pragma once

#include "lanes.cuh"

namespace tvfast::gpu {

// A block of 64 threads multiplies tiles of 64 by 64; a thread holds 8 by 8 elements in registers,
// rows and columns of its place in steps of 8, so that a warp's accesses fall into all banks.
inline constexpr int kSide = 64;
inline constexpr int kOwn = 8;
inline constexpr int kProductThreads = (kSide / kOwn) * (kSide / kOwn);
inline constexpr int kSlab = 16;  // steps of k that are in shared memory at a time

// One column more than a tile has, so that threads that store along k meet different banks.
struct Slabs {
  F left[kSlab][kSide + 1];  // left[k][m] = L(m, k)
  F right[kSlab][kSide];     // right[k][n] = R(k, n)
};

// Along what the left operand lies in memory, and neighbouring threads read it.
enum class Left { ROWS, STEPS };

// Elements of a tile that a thread holds: (row(m), column(n)).
struct Own {
  int row_of_thread = static_cast<int>(threadIdx.x) / kOwn;
  int column_of_thread = static_cast<int>(threadIdx.x) % kOwn;
  TVFAST_STAGE_MEMBER int row(int m) const { return m * kOwn + row_of_thread; }
  TVFAST_STAGE_MEMBER int column(int n) const { return n * kOwn + column_of_thread; }
};

// Goes on with the chains in `c` for `depth` steps; left(m, k) and right(k, n) give the operands.
// Every thread of the block takes part.
template <Left along, class LeftAt, class RightAt>
TVFAST_STAGE void multiply(Slabs& slabs, std::int64_t depth, LeftAt&& left, RightAt&& right,
                           F (&c)[kOwn][kOwn]) {
  const Own own;
  const int lane = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (std::int64_t start = 0; start < depth; start += kSlab) {
    const int n_steps = static_cast<int>(depth - start < kSlab ? depth - start : kSlab);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < n_steps; ++k) {
      if constexpr (along == Left::ROWS) slabs.left[k][lane] = left(lane, start + k);
      slabs.right[k][lane] = right(start + k, lane);
    }
    if constexpr (along == Left::STEPS) {
      const int k = lane % kSlab;
      if (k < n_steps) {
#pragma unroll 4
        for (int m = lane / kSlab; m < kSide; m += kProductThreads / kSlab)
          slabs.left[k][m] = left(m, start + k);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < n_steps; ++k) {
      F l[kOwn], r[kOwn];
#pragma unroll
      for (int m = 0; m < kOwn; ++m) l[m] = slabs.left[k][own.row(m)];
#pragma unroll
      for (int n = 0; n < kOwn; ++n) r[n] = slabs.right[k][own.column(n)];
#pragma unroll
      for (int m = 0; m < kOwn; ++m)
#pragma unroll
        for (int n = 0; n < kOwn; ++n) c[m][n] = __fmaf_rn(l[m], r[n], c[m][n]);
    }
  }
}

TVFAST_STAGE void clear(F (&c)[kOwn][kOwn]) {
#pragma unroll
  for (int m = 0; m < kOwn; ++m)
#pragma unroll
    for (int n = 0; n < kOwn; ++n) c[m][n] = 0.0f;
}

}  // namespace tvfast::gpu
