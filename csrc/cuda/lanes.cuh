// The lane types of one CUDA thread, which stages.inl is written in, and loads and stores of the
// elements that a thread takes at a time.
#pragma once

#include "../core/philox.hpp"
#include "../core/program.hpp"
#include "device_table.hpp"
#include "policy.hpp"
#include "simt.hpp"

#define TVFAST_STAGE static __device__ __forceinline__
#define TVFAST_STAGE_MEMBER __device__ __forceinline__

namespace tvfast::gpu {

using F = float;
using M = bool;
using U = std::uint32_t;

TVFAST_STAGE F splat(float x) { return x; }
TVFAST_STAGE U splat_bits(std::uint32_t x) { return x; }
TVFAST_STAGE U bits(F x) { return __float_as_uint(x); }
TVFAST_STAGE F from_bits(U x) { return __uint_as_float(x); }
TVFAST_STAGE std::int32_t from_unsigned(U x) { return static_cast<std::int32_t>(x); }
TVFAST_STAGE F select(M m, F a, F b) { return m ? a : b; }
TVFAST_STAGE F masked(M m, F x) { return m ? x : 0.0f; }
TVFAST_STAGE M invert(M m) { return !m; }
TVFAST_STAGE F magnitude(F x) { return from_bits(bits(x) & 0x7fffffffu); }
TVFAST_STAGE M is_nan(F x) { return x != x; }

#include "../core/stages.inl"

// Elements of a unit of work: what one thread holds of every tensor at once.
inline constexpr int kQuad = 4;

// bfloat16 and float16 to float and back; every NaN is written as the quiet one.
template <DType dtype>
TVFAST_STAGE F widen(std::uint32_t h) {
  if constexpr (dtype == DType::BF16) return from_bits(h << 16);
  return half_to_float(static_cast<std::uint16_t>(h));
}
template <DType dtype>
TVFAST_STAGE std::uint32_t narrow(F x) {
  if constexpr (dtype == DType::BF16) {
    const U u = bits(x);
    return is_nan(x) ? 0x7fc0u : (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  } else {
    return is_nan(x) ? 0x7e00u : float_to_half(x);
  }
}
TVFAST_STAGE U quiet(F x) { return is_nan(x) ? 0x7fc00000u : bits(x); }

// Sixteen bytes of 16-bit storage, elements [i, i + 8).
struct Packet {
  uint4 words;
};

TVFAST_STAGE Packet load_packet(const void* data, std::int64_t i) {
  return {__ldcs(reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(data) + i))};
}

TVFAST_STAGE std::uint32_t word(const Packet& packet, int at) {
  return at == 0   ? packet.words.x
         : at == 1 ? packet.words.y
         : at == 2 ? packet.words.z
                   : packet.words.w;
}

// Quad `at` of a packet.
template <DType dtype>
TVFAST_STAGE void unpack(const Packet& packet, int at, F* x) {
  const std::uint32_t low = word(packet, 2 * at), high = word(packet, 2 * at + 1);
  if constexpr (dtype == DType::BF16) {
    x[0] = from_bits(low << 16);
    x[1] = from_bits(low & 0xffff0000u);
    x[2] = from_bits(high << 16);
    x[3] = from_bits(high & 0xffff0000u);
  } else {
    x[0] = widen<dtype>(low & 0xffffu);
    x[1] = widen<dtype>(low >> 16);
    x[2] = widen<dtype>(high & 0xffffu);
    x[3] = widen<dtype>(high >> 16);
  }
}

template <DType dtype>
TVFAST_STAGE uint2 pack(const F* x) {
  return {narrow<dtype>(x[0]) | narrow<dtype>(x[1]) << 16, narrow<dtype>(x[2]) | narrow<dtype>(x[3])
                                                                                     << 16};
}

TVFAST_STAGE F load_one(const DeviceView& view, std::int64_t i) {
  if (view.dtype == static_cast<int>(DType::F32)) return static_cast<const float*>(view.data)[i];
  const std::uint32_t h = static_cast<const std::uint16_t*>(view.data)[i];
  return view.dtype == static_cast<int>(DType::BF16) ? widen<DType::BF16>(h) : widen<DType::F16>(h);
}

TVFAST_STAGE void store_one(void* out, int dtype, std::int64_t i, F x) {
  if (dtype == static_cast<int>(DType::F32)) {
    static_cast<std::uint32_t*>(out)[i] = quiet(x);
  } else {
    static_cast<std::uint16_t*>(out)[i] = static_cast<std::uint16_t>(
        dtype == static_cast<int>(DType::BF16) ? narrow<DType::BF16>(x) : narrow<DType::F16>(x));
  }
}

// Elements [i, i + n), n <= 4, of a view of any type; the rest is zero. `whole` quads are one load.
TVFAST_STAGE void load_quad(const DeviceView& view, std::int64_t i, int n, bool whole, F* x) {
  if (whole && view.quads != 0) {
    if (view.dtype == static_cast<int>(DType::F32)) {
      const uint4 w =
          __ldcs(reinterpret_cast<const uint4*>(static_cast<const float*>(view.data) + i));
      x[0] = from_bits(w.x);
      x[1] = from_bits(w.y);
      x[2] = from_bits(w.z);
      x[3] = from_bits(w.w);
      return;
    }
    const uint2 w =
        __ldcs(reinterpret_cast<const uint2*>(static_cast<const std::uint16_t*>(view.data) + i));
    const Packet packet{{w.x, w.y, 0u, 0u}};
    if (view.dtype == static_cast<int>(DType::BF16)) {
      unpack<DType::BF16>(packet, 0, x);
    } else {
      unpack<DType::F16>(packet, 0, x);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kQuad; ++e) x[e] = e < n ? load_one(view, i + e) : 0.0f;
}

// s_k of those elements, before other models' scores rule any out.
TVFAST_STAGE void load_scores(const DeviceView& view, const DeviceScoreMap& map, std::int64_t i,
                              int n, bool whole, F* score) {
  load_quad(view, i, n, whole, score);
#pragma unroll
  for (int e = 0; e < kQuad; ++e)
    score[e] = magnitude(mapped_score(score[e], map.scale, map.shift, map.floor));
}

TVFAST_STAGE void store_quad(void* out, int dtype, std::int64_t i, int n, bool whole, const F* x) {
  if (whole) {
    if (dtype == static_cast<int>(DType::F32)) {
      const uint4 w = {quiet(x[0]), quiet(x[1]), quiet(x[2]), quiet(x[3])};
      __stcs(reinterpret_cast<uint4*>(static_cast<float*>(out) + i), w);
      return;
    }
    const uint2 w =
        dtype == static_cast<int>(DType::BF16) ? pack<DType::BF16>(x) : pack<DType::F16>(x);
    __stcs(reinterpret_cast<uint2*>(static_cast<std::uint16_t*>(out) + i), w);
    return;
  }
#pragma unroll
  for (int e = 0; e < kQuad; ++e)
    if (e < n) store_one(out, dtype, i + e, x[e]);
}

}  // namespace tvfast::gpu
