// Hooks without intrinsics: the scalar table, NEON for now, and the emulated one.

template <bool streaming, class V, class T>
TVFAST_INLINE void put(T* p, V v) {
  store(p, v);
}
TVFAST_INLINE std::uint32_t mask_bits(M m) {
  std::uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    result |= (static_cast<std::uint32_t>(m[lane]) & 1u) << lane;
  return result;
}

TVFAST_INLINE bool any_nan(F a, F b) { return mask_bits((a != a) | (b != b)) != 0; }

// The bits of floats with the upper 16 rounded to nearest even; the lower are of no meaning.
TVFAST_INLINE U round_upper(U u) { return u + (0x7fffu + ((u >> 16) & 1u)); }

// a * b + c, rounded once.
TVFAST_INLINE F fused_add(F a, F b, F c) {
  for (int lane = 0; lane < kLanes; ++lane) c[lane] = std::fma(a[lane], b[lane], c[lane]);
  return c;
}

TVFAST_INLINE F widen_bf16(const std::uint16_t* p) {
  return from_bits(__builtin_convertvector(load<H>(p), U) << 16);
}
TVFAST_INLINE D widened(const float* p) { return __builtin_convertvector(load<HalfF>(p), D); }

// x y + c, rounded once: x and y hold floats, so that their product is exact.
TVFAST_INLINE D add_product(D x, D y, D c) { return x * y + c; }

// High word of the 64-bit product, by 16-bit halves.
TVFAST_INLINE U mul_high(U a, std::uint32_t b) {
  const U a0 = a & 0xffffu, a1 = a >> 16;
  const std::uint32_t b0 = b & 0xffffu, b1 = b >> 16;
  const U low = a0 * b0, cross = a1 * b0;
  const U middle = (low >> 16) + (cross & 0xffffu) + a0 * b1;
  return a1 * b1 + (cross >> 16) + (middle >> 16);
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
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = table[index[lane]];
  return index;
}
