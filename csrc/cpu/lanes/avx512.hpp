// Hooks for 512-bit vectors. Stores that stream need addresses aligned to the vector stored.

#define TVFAST_NATIVE_F16

template <bool streaming, class V, class T>
TVFAST_INLINE void put(T* p, V v) {
  if constexpr (!streaming) {
    store(p, v);
  } else if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
  }
}
TVFAST_INLINE std::uint32_t mask_bits(M m) { return _mm512_movepi32_mask((__m512i)m); }

TVFAST_INLINE bool any_nan(F a, F b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
}

// The bits of floats with the upper 16 rounded to nearest even; the lower are of no meaning.
TVFAST_INLINE U round_upper(U u) {
  const __m512i x = (__m512i)u, down = _mm512_add_epi32(x, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x10000));
  return (U)_mm512_mask_add_epi32(down, odd, down, _mm512_set1_epi32(1));
}

TVFAST_INLINE F fused_add(F a, F b, F c) {
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// kDoubles floats; the compiler would convert them in two halves.
TVFAST_INLINE D widened(const float* p) { return (D)_mm512_cvtps_pd(_mm256_loadu_ps(p)); }

// x y + c, rounded once.
TVFAST_INLINE D add_product(D x, D y, D c) {
  return (D)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)c);
}

TVFAST_INLINE U mul_high(U a, std::uint32_t b) {
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(x, y), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  return (U)_mm512_mask_mov_epi32(even, 0xAAAA, odd);
}

// The compiler would convert them in two halves.
TVFAST_INLINE F widen_bf16(const std::uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}

TVFAST_INLINE F widen_f16(const std::uint16_t* p) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
TVFAST_INLINE H narrow_f16(F x) {
  return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Writes the lanes of `m` to `out` one after the other, and anything after them; returns how many.
TVFAST_INLINE int append(std::uint32_t* out, U v, M m) {
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)m);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, (__m512i)v));
  return __builtin_popcount(mask);
}

// count + 1 in the lanes of `m`.
TVFAST_INLINE I tally(I count, M m) { return m ? count + 1 : count; }

// The low kLanes bits as lanes.
TVFAST_INLINE M from_mask_bits(std::uint32_t bits) {
  return (M)_mm512_movm_epi32(static_cast<__mmask16>(bits));
}

// The entries of a table at indices below 2^31.
TVFAST_INLINE U gathered(const std::uint32_t* table, U index) {
  return (U)_mm512_i32gather_epi32((__m512i)index, table, 4);
}
