// Lane types of one instruction set, in the compiler's vector extensions. Included once per ISA,
// inside that ISA's target region and namespace, with TVFAST_LANES set; deliberately without an
// include guard. Order of inclusion: types.hpp, the ISA's own hooks (portable.hpp, avx2.hpp,
// avx512.hpp), then convert.hpp.
//
// F float, M comparison result (all bits set or none), U and I 32-bit integers, H 16-bit storage of
// as many lanes. Comparisons of F give M; `m ? a : b` selects by lane. D double and Q 64-bit
// integers fill one vector too, with half as many lanes; the compiler keeps larger ones in memory.

inline constexpr int kLanes = TVFAST_LANES;
inline constexpr int kDoubles = kLanes > 1 ? kLanes / 2 : 1;

typedef float F __attribute__((vector_size(4 * TVFAST_LANES)));
typedef std::int32_t I __attribute__((vector_size(4 * TVFAST_LANES)));
typedef std::uint32_t U __attribute__((vector_size(4 * TVFAST_LANES)));
typedef float HalfF __attribute__((vector_size(4 * kDoubles)));
typedef double D __attribute__((vector_size(8 * kDoubles)));
typedef std::uint64_t Q __attribute__((vector_size(8 * kDoubles)));
typedef std::uint16_t H __attribute__((vector_size(2 * TVFAST_LANES)));
using M = I;

// Subtracting keeps a negative zero, which adding would lose.
TVFAST_INLINE F splat(float x) { return x - F{}; }
TVFAST_INLINE U splat_bits(std::uint32_t x) { return U{} + x; }
TVFAST_INLINE U bits(F x) { return (U)x; }
TVFAST_INLINE F from_bits(U x) { return (F)x; }
TVFAST_INLINE I from_unsigned(U x) { return (I)x; }
TVFAST_INLINE F select(M m, F a, F b) { return m ? a : b; }
TVFAST_INLINE F masked(M m, F x) { return m ? x : F{}; }
TVFAST_INLINE M invert(M m) { return ~m; }
TVFAST_INLINE M all_lanes() { return ~M{}; }
TVFAST_INLINE F magnitude(F x) { return from_bits(bits(x) & 0x7fffffffu); }
TVFAST_INLINE M is_nan(F x) { return x != x; }

template <class V, class T>
TVFAST_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
TVFAST_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Through memory: indexing a vector would keep it there for the whole loop before.
template <class V>
TVFAST_INLINE auto lane_sum(V v) {
  std::remove_reference_t<decltype(v[0])> lanes[sizeof v / sizeof v[0]];
  store(lanes, v);
  auto sum = lanes[0];
  for (std::size_t lane = 1; lane < std::size(lanes); ++lane) sum += lanes[lane];
  return sum;
}
template <class V>
TVFAST_INLINE auto lane_max(V v) {
  std::remove_reference_t<decltype(v[0])> lanes[sizeof v / sizeof v[0]];
  store(lanes, v);
  return *std::max_element(std::begin(lanes), std::end(lanes));
}

// { 0, 1, 2, ... }
TVFAST_INLINE U iota() {
  U v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = static_cast<std::uint32_t>(lane);
  return v;
}

// Writes a0 b0 c0 d0 a1 b1 c1 d1 ...
TVFAST_INLINE void interleave(std::uint32_t* out, U a, U b, U c, U d) {
  if constexpr (kLanes == 1) {
    const std::uint32_t words[4] = {a[0], b[0], c[0], d[0]};
    std::memcpy(out, words, sizeof words);
  } else {
    U first, second, halves[4];
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint32_t from = static_cast<std::uint32_t>(lane / 2 + (lane % 2) * kLanes);
      first[lane] = from;
      second[lane] = from + kLanes / 2;
    }
    halves[0] = __builtin_shuffle(a, c, first);
    halves[1] = __builtin_shuffle(b, d, first);
    halves[2] = __builtin_shuffle(a, c, second);
    halves[3] = __builtin_shuffle(b, d, second);
    for (int half = 0; half < 2; ++half) {
      store(out + 2 * half * kLanes,
            __builtin_shuffle(halves[2 * half], halves[2 * half + 1], first));
      store(out + (2 * half + 1) * kLanes,
            __builtin_shuffle(halves[2 * half], halves[2 * half + 1], second));
    }
  }
}
