// Divergences of rows as distributions. No include guard on purpose.
//
// Products and sums are rounded one by one, and every row has as many running sums on every
// instruction set, so that all give the same bits.
//
// Rows that differ little are taken in float32. With t = x - y, x of `of` and y of `from`, and c
// such that the p sum up to 1, p / q = e^(t + c), and the divergence is the sum of
// q phi((p - q) / q), phi(u) = (1 + u) log(1 + u) - u: no term is negative, so that nothing cancels
// and the result keeps the digits of its terms, however small it is. Other rows are taken in
// float64 by the definition, whose terms cancel but for their squares.

inline constexpr int kSums = 8;
inline constexpr int kSumVectors = kSums / kDoubles;
inline constexpr int kNearSums = 16;
inline constexpr int kNearVectors = kNearSums / kLanes;
// Of rows that differ little: |t| is at most kNear, on which the polynomials rely, and y - max y at
// least kDeepest, since its rounding is that of e^(y - max y).
inline constexpr float kNear = 1.0f / 32, kDeepest = -4.0f;
inline constexpr std::int64_t kSummed = 512;     // elements of a partial sum
inline constexpr std::int64_t kChunk = 1 << 14;  // elements whose exponentials are kept
static_assert(kSums % kDoubles == 0 && kNearSums % kLanes == 0 && kSummed % kNearSums == 0 &&
              kSummed % kSums == 0 && kChunk % kSummed == 0);

struct Sums {
  D lanes[kSumVectors] = {};
};

TVFAST_INLINE D repeated(double x) { return x - D{}; }

TVFAST_INLINE double total(const Sums& sums) {
  double x[kSums];
  std::memcpy(x, sums.lanes, sizeof x);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// e^x of x <= 0, one or two units off; 0 within 1e-304, and NaN stays NaN.
TVFAST_INLINE D exponential(D x) {
  constexpr double kShift = 0x1.8p52;  // a number below 2^51 added to it is in its lowest bits
  constexpr double kLog2High = 6.93147180369123816490e-01, kLog2Low = 1.90821492927058770002e-10;
  // 1 / n!: |r| <= log(2) / 2, where the next term is 2e-16 of the sum.
  constexpr double kTerms[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                               1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                               1.0 / 24,        1.0 / 6,        0.5,           1.0};
  x = x < repeated(-700.0) ? repeated(-700.0) : x;
  const D shifted = x * 1.44269504088896340736 + kShift, power = shifted - kShift;
  const D r = (x - power * kLog2High) - power * kLog2Low;
  D sum = repeated(kTerms[0]);
  for (int term = 1; term < int(std::size(kTerms)); ++term) sum = sum * r + kTerms[term];
  sum = sum * r + 1.0;
  return (D)((Q)sum + ((Q)shifted << 52));
}

// log(x / y) of x, y > 0.
TVFAST_INLINE D log_ratio(D x, D y) {
  const D s = (x - y) / (x + y), z = s * s;
  constexpr double kMost = 0.01;  // the term after the last is below 1e-17 of the sum
  bool near = true;
  for (int lane = 0; lane < kDoubles; ++lane) near &= z[lane] <= kMost;
  if (!near) {
    double found[kDoubles];
    for (int lane = 0; lane < kDoubles; ++lane) found[lane] = std::log(x[lane] / y[lane]);
    return load<D>(found);
  }
  D sum = repeated(1.0 / 15);
  for (int odd = 13; odd > 0; odd -= 2) sum = sum * z + 1.0 / odd;
  return (s + s) * sum;
}

static float largest_of(const View& view, std::int64_t begin, std::int64_t n, float* chunk) {
  F most = splat(-std::numeric_limits<float>::infinity());
  for (std::int64_t at = 0; at < n; at += kChunk) {
    const std::int64_t here = std::min(kChunk, n - at);
    widen(view, begin + at, here, chunk);
    for (std::int64_t i = here; i % kLanes != 0; ++i) chunk[i] = chunk[0];
    for (std::int64_t i = 0; i < here; i += kLanes) {
      const F x = load<F>(chunk + i);
      most = select(x > most, x, most);
    }
  }
  return lane_max(most);
}

// Writes e^(x - most) of n <= kChunk elements, then zeros up to a multiple of kSums; returns the
// sum.
static double exponentials(const View& view, std::int64_t begin, std::int64_t n, float most,
                           float* chunk, double* out) {
  widen(view, begin, n, chunk);
  for (std::int64_t i = n; i % kSums != 0; ++i) chunk[i] = -std::numeric_limits<float>::infinity();
  const D largest = repeated(most);
  double sum = 0.0;
  for (std::int64_t at = 0; at < n; at += kSummed) {
    Sums sums;
    for (std::int64_t i = at; i < std::min(at + kSummed, n); i += kSums)
      for (int v = 0; v < kSumVectors; ++v) {
        const D x = widened(chunk + i + v * kDoubles) - largest;
        const D e = exponential(x);
        store(out + i + v * kDoubles, e);
        sums.lanes[v] += e;
      }
    sum += total(sums);
  }
  return sum;
}

// out = fn(element of a, element of b, out) of `n` elements, all from `begin` on.
template <class Fn>
TVFAST_INLINE void over_pair(const View& a, const View& b, std::int64_t begin, std::int64_t n,
                             Scratch& scratch, float* out, Fn&& fn) {
  float* first = scratch.rows.get(kChunk + 64);
  float* second = scratch.taus.get(kChunk + 64);
  for (std::int64_t at = 0; at < n; at += kChunk) {
    const std::int64_t here = std::min(kChunk, n - at);
    widen(a, begin + at, here, first);
    widen(b, begin + at, here, second);
    float* p = out + begin + at;
    std::int64_t i = 0;
    for (; i + kLanes <= here; i += kLanes)
      store(p + i, fn(load<F>(first + i), load<F>(second + i), load<F>(p + i)));
    const std::size_t left = static_cast<std::size_t>(here - i) * sizeof(float);
    F last = {};
    std::memcpy(&last, p + i, left);
    last = fn(load<F>(first + i), load<F>(second + i), last);
    std::memcpy(p + i, &last, left);
  }
}

struct NearSums {
  F lanes[kNearVectors] = {};
};

TVFAST_INLINE double total(const NearSums& sums) {
  float x[kNearSums];
  std::memcpy(x, sums.lanes, sizeof x);
  for (int half = kNearSums / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) x[lane] += x[lane + half];
  return x[0];
}

// e^x of kDeepest <= x <= 0.
TVFAST_INLINE F near_exponential(F x) {
  constexpr float kShift = 0x1.8p23f;
  constexpr float kLog2High = 0.693145752f, kLog2Low = 1.42860677e-6f;
  const F shifted = x * 1.44269504f + kShift, power = shifted - kShift;
  const F r = (x - power * kLog2High) - power * kLog2Low;
  F sum = splat(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = sum * r + term;
  return from_bits(bits(sum) + (bits(shifted) << 23));
}

// e^x - 1 of |x| <= 2 kNear.
TVFAST_INLINE F near_power(F x) {
  F sum = splat(1.0f / 120);
  for (const float term : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f}) sum = sum * x + term;
  return sum * x;
}

// phi(u) / u of |u| <= 0.07.
TVFAST_INLINE F near_phi(F u) {
  F sum = splat(-1.0f / 42);
  for (const float term : {1.0f / 30, -1.0f / 20, 1.0f / 12, -1.0f / 6, 0.5f}) sum = sum * u + term;
  return sum * u;
}

// The exponentials and differences of `n` <= kChunk elements, and what they add to both sums.
// Returns whether all are in range.
static bool near_chunk(const Divergence& matrix, std::int64_t begin, std::int64_t n, float most,
                       float* e, float* t, double sums[2]) {
  widen(matrix.from, begin, n, e);
  widen(matrix.of, begin, n, t);
  for (std::int64_t i = n; i % kNearSums != 0; ++i) e[i] = t[i] = most;  // in range, and t is 0
  const F largest = splat(most), near = splat(kNear), deepest = splat(kDeepest);
  M inside = all_lanes();
  for (std::int64_t at = 0; at < n; at += kSummed) {
    NearSums powers, changes;
    for (std::int64_t i = at; i < std::min(at + kSummed, n); i += kNearSums)
      for (int v = 0; v < kNearVectors; ++v) {
        const std::int64_t place = i + v * kLanes;
        const F y = load<F>(e + place), x = y - largest, change = load<F>(t + place) - y;
        inside &= (magnitude(change) <= near) & (x >= deepest);
        F power = near_exponential(x);
        if (place + kLanes > n) power = masked(first_lanes(std::min(place, n), n), power);
        store(e + place, power);
        store(t + place, change);
        powers.lanes[v] += power;
        changes.lanes[v] += power * near_power(change);
      }
    sums[0] += total(powers);
    sums[1] += total(changes);
  }
  return mask_bits(invert(inside)) == 0;
}

// The divergence of a row; false, and nothing, if its changes are too large for that.
static bool near_divergence(const Divergence& matrix, std::int64_t begin, Scratch& scratch,
                            double* out) {
  const std::int64_t length = matrix.length;
  float* e = scratch.rows.get(kChunk + 64);
  float* t = scratch.taus.get(kChunk + 64);
  const float most = largest_of(matrix.from, begin, length, e);
  double sums[2] = {0.0, 0.0}, again[2];
  for (std::int64_t at = 0; at < length; at += kChunk)
    if (!near_chunk(matrix, begin + at, std::min(kChunk, length - at), most, e, t, sums))
      return false;
  const F shift = splat(static_cast<float>(-std::log1p(sums[1] / sums[0])));
  const F add = splat(static_cast<float>(matrix.floor * sums[0]));
  double sum = 0.0;
  for (std::int64_t at = 0; at < length; at += kChunk) {
    const std::int64_t here = std::min(kChunk, length - at);
    if (length > kChunk) near_chunk(matrix, begin + at, here, most, e, t, again);
    for (std::int64_t first = 0; first < here; first += kSummed) {
      NearSums partial;
      for (std::int64_t i = first; i < std::min(first + kSummed, here); i += kNearSums)
        for (int v = 0; v < kNearVectors; ++v) {
          const F power = load<F>(e + i + v * kLanes);
          const F change = power * near_power(load<F>(t + i + v * kLanes) + shift);
          partial.lanes[v] += change * near_phi(change / (power + add));
        }
      sum += total(partial);
    }
  }
  *out = sum / sums[0];
  return true;
}

static double divergence_by_definition(const Divergence& matrix, std::int64_t begin,
                                       Scratch& scratch) {
  const std::int64_t length = matrix.length;
  const View* views[2] = {&matrix.of, &matrix.from};
  float* chunk = scratch.rows.get(kChunk + 64);
  double* exponents[2] = {scratch.exponents.get(2 * kChunk), nullptr};
  exponents[1] = exponents[0] + kChunk;
  float most[2];
  double sums[2] = {0.0, 0.0};
  for (int side = 0; side < 2; ++side) {
    most[side] = largest_of(*views[side], begin, length, chunk);
    for (std::int64_t at = 0; at < length; at += kChunk)
      sums[side] += exponentials(*views[side], begin + at, std::min(kChunk, length - at),
                                 most[side], chunk, exponents[side]);
  }
  const D add[2] = {repeated(matrix.floor * sums[0]), repeated(matrix.floor * sums[1])};
  const D ratio = repeated(std::log(sums[1] / sums[0]));
  double sum = 0.0;
  for (std::int64_t at = 0; at < length; at += kChunk) {
    const std::int64_t here = std::min(kChunk, length - at);
    if (length > kChunk)  // otherwise they are still there
      for (int side = 0; side < 2; ++side)
        exponentials(*views[side], begin + at, here, most[side], chunk, exponents[side]);
    for (std::int64_t first = 0; first < here; first += kSummed) {
      Sums partial;
      for (std::int64_t i = first; i < std::min(first + kSummed, here); i += kSums) {
        D terms[kSumVectors];
        for (int v = 0; v < kSumVectors; ++v) {
          const D x = load<D>(exponents[0] + i + v * kDoubles) + add[0];
          const D y = load<D>(exponents[1] + i + v * kDoubles) + add[1];
          terms[v] = x * (log_ratio(x, y) + ratio);
        }
        if (i + kSums > here) {  // what lies behind the row
          double x[kSums];
          std::memcpy(x, terms, sizeof x);
          std::fill(x + (here - i), x + kSums, 0.0);
          std::memcpy(terms, x, sizeof x);
        }
        for (int v = 0; v < kSumVectors; ++v) partial.lanes[v] += terms[v];
      }
      sum += total(partial);
    }
  }
  return sum / sums[0];
}

static void divergence_of_row(const Divergence& matrix, std::int64_t row, Scratch& scratch) {
  const std::int64_t begin = row * matrix.length, length = matrix.length;
  if (!near_divergence(matrix, begin, scratch, matrix.out + row))
    matrix.out[row] = divergence_by_definition(matrix, begin, scratch);
  if (matrix.importances == nullptr) return;
  const double divergence = matrix.out[row];  // NaN stays NaN
  const F factor = splat(static_cast<float>(divergence < 0.0 ? 0.0 : divergence));
  over_pair(matrix.of, matrix.from, begin, length, scratch, matrix.importances,
            [=](F of, F from, F)
                __attribute__((always_inline)) { return magnitude(of - from) * factor; });
}

static void fuse_run(const Fusion& fusion, std::int64_t begin, std::int64_t n, Scratch& scratch) {
  const F least = splat(fusion.least), scale = splat(fusion.scale), one = splat(1.0f);
  over_pair(fusion.of, fusion.from, begin, n, scratch, fusion.importances,
            [=](F of, F from, F importance) __attribute__((always_inline)) {
              return from + (of - from) * masked(importance >= least, one) * scale;
            });
}
