// Hooks for 256-bit vectors. Stores that stream need addresses aligned to the vector stored.

#define TVFAST_NATIVE_F16

template <bool streaming, class V, class T>
TVFAST_INLINE void put(T* p, V v) {
  if constexpr (!streaming) {
    store(p, v);
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
  }
}
TVFAST_INLINE std::uint32_t mask_bits(M m) {
  return static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)m));
}

TVFAST_INLINE bool any_nan(F a, F b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
}

// The bits of floats with the upper 16 rounded to nearest even; the lower are of no meaning.
TVFAST_INLINE U round_upper(U u) { return u + (0x7fffu + ((u >> 16) & 1u)); }

TVFAST_INLINE F fused_add(F a, F b, F c) {
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

TVFAST_INLINE F widen_bf16(const std::uint16_t* p) {
  return from_bits(__builtin_convertvector(load<H>(p), U) << 16);
}
TVFAST_INLINE D widened(const float* p) { return __builtin_convertvector(load<HalfF>(p), D); }

// x y + c, rounded once.
TVFAST_INLINE D add_product(D x, D y, D c) {
  return (D)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)c);
}

TVFAST_INLINE U mul_high(U a, std::uint32_t b) {
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, y), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  return (U)_mm256_blend_epi32(even, odd, 0xAA);
}

TVFAST_INLINE F widen_f16(const std::uint16_t* p) {
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TVFAST_INLINE H narrow_f16(F x) {
  return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Writes the lanes of `m` to `out` one after the other, and possibly anything after them; returns
// how many.
TVFAST_INLINE int append(std::uint32_t* out, U v, M m) {
  int n = 0;
  for (std::uint32_t rest = mask_bits(m); rest != 0; rest &= rest - 1)
    out[n++] = v[std::countr_zero(rest)];
  return n;
}

// count + 1 in the lanes of `m`.
TVFAST_INLINE I tally(I count, M m) { return count - m; }

// The low kLanes bits as lanes.
TVFAST_INLINE M from_mask_bits(std::uint32_t bits) { return (M)(((bits >> iota()) & 1u) != 0u); }

// The entries of a table at indices below 2^31.
TVFAST_INLINE U gathered(const std::uint32_t* table, U index) {
  return (U)_mm256_i32gather_epi32(reinterpret_cast<const int*>(table), (__m256i)index, 4);
}
