// 8-bit floating point to fp32 and back. No include guard on purpose.

typedef std::uint8_t Codes __attribute__((vector_size(TVFAST_LANES)));

// A format in integer arithmetic on the bits of fp32.
template <Fp8 format>
struct Fp8Bits {
  static constexpr bool kE4M3 = format == Fp8::E4M3;
  static constexpr std::uint32_t kShift = kE4M3 ? 20 : 21;             // to fp32's mantissa
  static constexpr std::uint32_t kBias = (kE4M3 ? 120u : 112u) << 23;  // to fp32's exponent
  static constexpr std::uint32_t kFirstNormal = kE4M3 ? 0x08 : 0x04;   // code
  static constexpr std::uint32_t kLeastNormal = kBias + (1u << 23);    // as fp32
  static constexpr std::uint32_t kLargest = kE4M3 ? 0x43e00000u : 0x47600000u;
  static constexpr std::uint32_t kLastFinite = kE4M3 ? 0x43e80000u : 0x476fffffu;  // that rounds so
  static constexpr std::uint32_t kBeyond =
      kE4M3 ? 0x7f : 0x7c;  // the code above the largest number
  static constexpr std::uint32_t kNan = 0x7f;
  static constexpr float kSubnormalUnit = kE4M3 ? 0x1p14f : 0x1p7f;  // its ulp is the least number
};

// Exact, subnormals included; NaN keeps only its class. Subtracting the least normal number gives a
// subnormal one without a subnormal operand.
template <Fp8 format>
TVFAST_INLINE F widen_codes(U code) {
  using B = Fp8Bits<format>;
  const U rest = code & 0x7fu;
  const U spread = rest << B::kShift;
  const F normal = from_bits(spread + B::kBias);
  const F subnormal = from_bits(spread + B::kLeastNormal) - from_bits(splat_bits(B::kLeastNormal));
  U value = (rest < B::kFirstNormal) ? bits(subnormal) : bits(normal);
  if constexpr (B::kE4M3) {
    value = (rest == B::kNan) ? splat_bits(0x7fc00000u) : value;
  } else {
    value = (rest >= B::kBeyond) ? (spread | 0x7f800000u) : value;
    value = (rest > B::kBeyond) ? splat_bits(0x7fc00000u) : value;
  }
  return from_bits(value | ((code & 0x80u) << 24));
}

// To nearest, ties to even.
template <Fp8 format>
TVFAST_INLINE U narrow_codes(F x, bool saturate) {
  using B = Fp8Bits<format>;
  U a = bits(x) & 0x7fffffffu;
  const M finite = (M)(a < 0x7f800000u);
  if (saturate) a = (((M)(a > B::kLargest)) & finite) ? splat_bits(B::kLargest) : a;
  const U odd = (a >> B::kShift) & 1u;
  const U normal = (a + ((1u << (B::kShift - 1)) - 1u - B::kBias) + odd) >> B::kShift;
  const U subnormal =
      bits(from_bits(a) + splat(B::kSubnormalUnit)) - bits(splat(B::kSubnormalUnit));
  U code = (a < B::kLeastNormal) ? subnormal : normal;
  code = (a > B::kLastFinite) ? splat_bits(B::kBeyond) : code;
  code = code | ((bits(x) >> 24) & 0x80u);
  const M is_nan_code = B::kE4M3 ? (M)(a > B::kLastFinite) : (M)(a > 0x7f800000u);
  return is_nan_code ? splat_bits(B::kNan) : code;
}

template <Fp8 format>
static void widen_fp8_as(const std::uint8_t* codes, std::int64_t n, float factor, float* out) {
  const F scale = splat(factor);
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    store(out + j, widen_codes<format>(__builtin_convertvector(load<Codes>(codes + j), U)) * scale);
  if (j >= n) return;
  Codes rest{};
  std::memcpy(&rest, codes + j, n - j);
  const F x = widen_codes<format>(__builtin_convertvector(rest, U)) * scale;
  std::memcpy(out + j, &x, (n - j) * sizeof(float));
}

template <Fp8 format>
static void narrow_fp8_as(const float* values, std::int64_t n, float factor, bool saturate,
                          std::uint8_t* codes) {
  const F scale = splat(factor);
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const U found = narrow_codes<format>(load<F>(values + j) / scale, saturate);
    store(codes + j, __builtin_convertvector(found, Codes));
  }
  if (j >= n) return;
  F rest{};
  std::memcpy(&rest, values + j, (n - j) * sizeof(float));
  const Codes last = __builtin_convertvector(narrow_codes<format>(rest / scale, saturate), Codes);
  std::memcpy(codes + j, &last, n - j);
}

static void widen_fp8_run(const std::uint8_t* codes, std::int64_t n, Fp8 format, float factor,
                          float* out) {
  if (format == Fp8::E4M3) return widen_fp8_as<Fp8::E4M3>(codes, n, factor, out);
  widen_fp8_as<Fp8::E5M2>(codes, n, factor, out);
}

static void narrow_fp8_run(const float* values, std::int64_t n, Fp8 format, float factor,
                           bool saturate, std::uint8_t* codes) {
  if (format == Fp8::E4M3) return narrow_fp8_as<Fp8::E4M3>(values, n, factor, saturate, codes);
  narrow_fp8_as<Fp8::E5M2>(values, n, factor, saturate, codes);
}

static float largest_finite_of(const float* values, std::int64_t n) {
  U most{};
  const auto take = [&most](F x) __attribute__((always_inline)) {
    const U a = bits(x) & 0x7fffffffu;
    const U finite = (a < 0x7f800000u) ? a : U{};
    most = (finite > most) ? finite : most;
  };
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) take(load<F>(values + j));
  if (j < n) {
    F rest{};
    std::memcpy(&rest, values + j, (n - j) * sizeof(float));
    take(rest);
  }
  return std::bit_cast<float>(lane_max(most));
}
