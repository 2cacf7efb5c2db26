// What a tile of a merge reads of its entry, and lower ends of bands with their ties resolved.
#pragma once

#include "api.hpp"
#include "keeping.cuh"

namespace tvfast::gpu {

// The lower end of a model's band with its ties resolved for hashed indices: an entry equal to `lo`
// survives iff its hash is at most `lo_last`.
struct LowerEnd {
  F lo, above_lo;
  U lo_last, multiplier;
};

TVFAST_STAGE LowerEnd lower_end(const ModelScalars& s) {
  const F above = from_bits(bits(s.lo) + 1u);  // lo is finite and not negative
  LowerEnd end{s.lo, above, 0xffffffffu, hash_multiplier(s.key)};
  if (s.lo_cut == 0) end.lo = above;
  if (s.lo_cut != 0 && s.lo_cut >> 32 == 0) end.lo_last = static_cast<U>(s.lo_cut) - 1u;
  return end;
}

// What a tile reads of its entry, in shared memory: no store of the merge can alias it, and it
// takes no registers.
template <int kModels>
struct TileScalars {
  DeviceEntry entry;
  TensorScalars tensor;
  DeviceModel views[kModels];
  ModelScalars models[kModels];
  LowerEnd ends[kModels];
};
template <>
struct TileScalars<0> {
  DeviceEntry entry;
  TensorScalars tensor;
};

// The mixed index of an element, where ties are hashed.
TVFAST_STAGE U mixed_for(const Program& program, const Quad& quad, int e) {
  return program.tie == Tie::HASH ? mixed_index(scaled_index(quad.index + e)) : 0u;
}

// d_k where kept, otherwise +0; `a` is what the band is of: a NaN of |d_k| is inside by itself.
TVFAST_STAGE F keep_from_end(const Program& program, const LowerEnd& end, U mixed, F a, F tau) {
  M kept = program.tie == Tie::HASH ? from_end_hashed(a, end.lo, end.above_lo,
                                                      tie_hash(mixed, end.multiplier) > end.lo_last)
                                    : from_end(a, end.lo);
  if (program.keep == Keep::SCORE) kept = kept | is_nan(tau);
  return masked(kept, tau);
}

}  // namespace tvfast::gpu
