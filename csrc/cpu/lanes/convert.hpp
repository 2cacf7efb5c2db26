// Storage to float lanes and back. Included after types.hpp and an ISA's hooks; no include guard on
// purpose.

// float16 in integer arithmetic, for instruction sets without a conversion. Exact; NaN keeps only
// its class.
TVFAST_INLINE F widen_f16_bits(U h) {
  const U sign = (h & 0x8000u) << 16;
  const U rest = h & 0x7fffu;
  // 2^112 moves the exponent bias from 15 to 127; the product is exact and normalises subnormals.
  const F scaled = from_bits(rest << 13) * 0x1p112f;
  const U special = (rest << 13) | 0x7f800000u;
  const U value = (rest >= 0x7c00u) ? special : bits(scaled);
  return from_bits(value | sign);
}
TVFAST_INLINE U narrow_f16_bits(F x) {
  const U sign = (bits(x) >> 16) & 0x8000u;
  const U a = bits(x) & 0x7fffffffu;
  const U normal = (a + (0xfffu - (112u << 23)) + ((a >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the binary point of a subnormal result with the last bit of the sum.
  const U subnormal = bits(from_bits(a) + 0.5f) - 0x3f000000u;
  U h = (a < 0x38800000u) ? subnormal : normal;
  h = (a >= 0x477ff000u) ? splat_bits(0x7c00u) : h;
  h = (a > 0x7f800000u) ? splat_bits(0x7e00u) : h;
  return (a > 0x7f800000u) ? h : (h | sign);
}

template <DType dtype>
TVFAST_INLINE F load_as_float(const void* p, std::int64_t i) {
  if constexpr (dtype == DType::F32) {
    return load<F>(static_cast<const float*>(p) + i);
  } else {
    const std::uint16_t* q = static_cast<const std::uint16_t*>(p) + i;
    if constexpr (dtype == DType::BF16) {
      return widen_bf16(q);
    } else {
#ifdef TVFAST_NATIVE_F16
      return widen_f16(q);
#else
      return widen_f16_bits(__builtin_convertvector(load<H>(q), U));
#endif
    }
  }
}

// Round to nearest even into storage; every NaN becomes the one quiet NaN.
TVFAST_INLINE H narrow_bf16(F x) {
  const U rounded = round_upper(bits(x)) >> 16;
  return __builtin_convertvector(is_nan(x) ? splat_bits(0x7fc0u) : rounded, H);
}
TVFAST_INLINE F quiet(F x) { return select(is_nan(x), from_bits(splat_bits(0x7fc00000u)), x); }

template <DType dtype, bool streaming>
TVFAST_INLINE void store_rounded(void* p, std::int64_t i, F x) {
  if constexpr (dtype == DType::F32) {
    put<streaming>(static_cast<float*>(p) + i, quiet(x));
  } else {
    std::uint16_t* q = static_cast<std::uint16_t*>(p) + i;
    if constexpr (dtype == DType::BF16) {
      put<streaming>(q, narrow_bf16(x));
    } else {
#ifdef TVFAST_NATIVE_F16
      put<streaming>(q, narrow_f16(quiet(x)));
#else
      put<streaming>(q, __builtin_convertvector(narrow_f16_bits(x), H));
#endif
    }
  }
}

// The last `count` < kLanes elements; the other lanes are zero.
template <DType dtype>
TVFAST_INLINE F load_partial(const void* p, std::int64_t i, int count) {
  alignas(64) unsigned char padded[4 * kLanes] = {};
  const std::size_t size = size_of(dtype);
  std::memcpy(padded, static_cast<const unsigned char*>(p) + i * size, count * size);
  return load_as_float<dtype>(padded, 0);
}
template <DType dtype>
TVFAST_INLINE void store_partial(void* p, std::int64_t i, F x, int count) {
  alignas(64) unsigned char padded[4 * kLanes];
  store_rounded<dtype, false>(padded, 0, x);
  const std::size_t size = size_of(dtype);
  std::memcpy(static_cast<unsigned char*>(p) + i * size, padded, count * size);
}
