// Gram matrices of a few task vectors in 16-bit storage: everything stays in registers, nothing is
// staged. No include guard on purpose.

// Differences of 16-bit numbers are, but for a few, whole multiples of one power of two and less
// than 2^kUnitBits of it. Their products are exact as sums, too, so that only the high parts need
// rounding: half as many instructions as for any numbers. A lane adds up 2^10 products per block.
inline constexpr int kUnitBits = 21;
inline constexpr std::int64_t kGramBlock = 1024 * kDoubles;

// Entries of a block that are no multiples are added one by one, up to so many.
inline constexpr int kMostOdd = 256;

// A tile with more blocks than this that are not like others is summed without units.
inline constexpr int kMostUnlike = 2;

// A power of two. Adding `rounding` and subtracting it changes what is no multiple, up to `end`.
struct Unit {
  int exponent;
  float rounding, end;

  // For magnitudes up to twice `largest`, or up to four times where that is a power of two.
  void choose(float largest) {
    exponent = static_cast<int>(std::bit_cast<std::uint32_t>(largest) >> 23) - 125 - kUnitBits;
    rounding = static_cast<float>(1.5 * power_of_two(exponent + 23));
    end = static_cast<float>(power_of_two(exponent + kUnitBits));
  }
  bool is_normal() const { return exponent >= -126 && exponent + 24 <= 127; }
};

// The products of every two of `count` task vectors, or of each with itself.
template <int count, bool squares>
struct Pairings {
  static constexpr int kPairs = squares ? count : count * (count + 1) / 2;
  int first[kPairs], second[kPairs];
  BinnedSum* sums[kPairs];

  explicit Pairings(BinnedSum* gram) {
    for (int a = 0, p = 0; a < count; ++a) {
      for (int b = a; b < (squares ? a + 1 : count); ++b, ++p) {
        first[p] = a;
        second[p] = b;
        sums[p] = gram + a * count + b;
      }
    }
  }

  // Whether the low part of every sum holds what a product of two units is counted in, and that is
  // not above the whole sum.
  bool hold(const Unit* units) const {
    for (int p = 0; p < kPairs; ++p) {
      const int window = sums[p]->window,
                exponent = units[first[p]].exponent + units[second[p]].exponent;
      if (window == kNoWindow || exponent < kWindowBits * (window - 1) ||
          exponent > kWindowBits * (window + 1))
        return false;
    }
    return true;
  }

  // Whether no product of entries up to `largest` raises a window.
  bool stay(const float* largest) const {
    for (int p = 0; p < kPairs; ++p) {
      const double most =
          static_cast<double>(largest[first[p]]) * static_cast<double>(largest[second[p]]);
      if (!(most < power_of_two(kWindowBits * (sums[p]->window + 1) - 1))) return false;
    }
    return true;
  }
};

// What is left of x beside multiples of a unit: zero for them, not for NaN.
TVFAST_INLINE U rest_of(F x, F rounding) { return bits(((x + rounding) - rounding) - x); }

// Adds the products of a block, or nothing: if too many entries are no multiples of a unit, or if a
// window would rise. `largest` of each task vector is what to expect, and then what was found.
template <DType dtype, int count, bool squares>
static bool add_unit_products(const Entry& entry, std::int64_t begin, std::int64_t end,
                              const Pairings<count, squares>& pairs, float* largest) {
  using S = Step<dtype>;
  constexpr int kPairs = Pairings<count, squares>::kPairs;
  Unit units[count];
  for (int k = 0; k < count; ++k) {
    units[k].choose(largest[k]);
    if (!units[k].is_normal()) return false;
  }
  if (!pairs.hold(units)) return false;
  D split[kPairs], whole[kPairs] = {};
  Q high[kPairs] = {};
  for (int p = 0; p < kPairs; ++p) split[p] = D{} + split_at(pairs.sums[p]->window).high;
  F rounding[count];
  U most[count] = {};
  const void *base = entry.origin().data, *models[count];
  for (int k = 0; k < count; ++k) {
    rounding[k] = splat(units[k].rounding);
    models[k] = entry.models[k].data;
  }
  std::uint32_t odd[count][kMostOdd + 2 * kLanes];
  int n_odd = 0;
  for (std::int64_t i = begin; i < end; i += S::kElements) {
    Pair tau[count], b = {};
    U first_rest = {}, second_rest = {};
    if (base != nullptr) {
      prefetch<dtype>(base, i);
      b = S::load(base, i);
    }
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      prefetch<dtype>(models[k], i);
      const Pair x = S::load(models[k], i);
      tau[k] = {x.first - b.first, x.second - b.second};
      most[k] = largest_lanes(largest_lanes(most[k], tau[k].first), tau[k].second);
      first_rest |= rest_of(tau[k].first, rounding[k]);
      second_rest |= rest_of(tau[k].second, rounding[k]);
    }
    if (__builtin_expect(mask_bits((M)((first_rest | second_rest) != 0u)) != 0, 0)) {
      const M first_odd = (M)(first_rest != 0u), second_odd = (M)(second_rest != 0u);
      int n = 0;
      for (int k = 0; k < count; ++k) {
        n = append(odd[k] + n_odd, bits(tau[k].first), first_odd);
        n += append(odd[k] + n_odd + n, bits(tau[k].second), second_odd);
        tau[k] = {masked(invert(first_odd), tau[k].first),
                  masked(invert(second_odd), tau[k].second)};
      }
      n_odd += n;
      if (n_odd > kMostOdd) return false;
    }
    alignas(64) float taus[count][S::kElements];
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      store(taus[k], tau[k].first);
      store(taus[k] + kLanes, tau[k].second);
    }
    // Read from memory they are widened by one instruction a vector, from registers by three.
    __asm__("" : "+m"(taus));
#pragma GCC unroll 4
    for (int j = 0; j < S::kElements; j += kDoubles) {
      D x[count];
#pragma GCC unroll 4
      for (int k = 0; k < count; ++k) x[k] = widened(taus[k] + j);
#pragma GCC unroll 16
      for (int a = 0, p = 0; a < count; ++a) {
#pragma GCC unroll 16
        for (int b = a; b < (squares ? a + 1 : count); ++b, ++p) {
          high[p] += (Q)add_product(x[a], x[b], split[p]);
          whole[p] = add_product(x[a], x[b], whole[p]);
        }
      }
    }
  }

  for (int k = 0; k < count; ++k) largest[k] = std::bit_cast<float>(lane_max(most[k]));
  for (int k = 0; k < count; ++k)
    if (!(largest[k] < units[k].end)) return false;
  if (!pairs.stay(largest)) return false;
#pragma GCC unroll 16
  for (int p = 0; p < kPairs; ++p) {  // indices that are constants keep the sums in registers above
    BinnedSum& sum = *pairs.sums[p];
    const auto highs = static_cast<std::int64_t>(lane_sum(high[p]) -
                                                 static_cast<std::uint64_t>(end - begin) *
                                                     std::bit_cast<std::uint64_t>(split[p][0]));
    const int exponent = units[pairs.first[p]].exponent + units[pairs.second[p]].exponent;
    const D multiples = whole[p] * power_of_two(-exponent);
    Int128 total = 0;
    for (int lane = 0; lane < kDoubles; ++lane) total += static_cast<std::int64_t>(multiples[lane]);
    sum.high += highs;
    sum.low +=
        (total << (exponent - kWindowBits * (sum.window - 1))) - (Int128{highs} << kWindowBits);
  }
  const auto entry_of = [&](int k, int i) {
    return static_cast<double>(std::bit_cast<float>(odd[k][i]));
  };
  for (int i = 0; i < n_odd; ++i)
    for (int p = 0; p < kPairs; ++p)
      pairs.sums[p]->add(entry_of(pairs.first[p], i) * entry_of(pairs.second[p], i));
  return true;
}

// Sums the products of a tile; `add_blocks` does so for a part of it whatever its entries are, and
// leaves `largest` of its last block.
template <DType dtype, int count, bool squares, class AddBlocks>
static void sum_unit_products(const TileCall& call, BinnedSum* gram, float* largest,
                              AddBlocks&& add_blocks) {
  const Pairings<count, squares> pairs(gram);
  std::int64_t i = call.begin;
  const auto add_up_to = [&](std::int64_t end) {
    if (i < end) add_blocks(i, end);
    i = end;
  };
  if (gram[0].window == kNoWindow) add_up_to(std::min(call.end, i + kMaxBlock));
  const std::int64_t end = call.end - (call.end - i) % Step<dtype>::kElements;
  for (int n_unlike = 0; i < end && n_unlike <= kMostUnlike;) {
    const std::int64_t next = std::min(i + kGramBlock, end);
    if (add_unit_products<dtype>(call.entry, i, next, pairs, largest)) {
      i = next;
    } else {
      add_up_to(next);
      ++n_unlike;
    }
  }
  add_up_to(call.end);
}

// Whether a tile was summed in units: for what is `wanted` of task vectors as they are, in 16 bits.
template <class AddBlocks>
static bool summed_in_units(const TileCall& call, unsigned wanted, BinnedSum* gram, float* largest,
                            AddBlocks&& add_blocks) {
  const Entry& entry = call.entry;
  const DType dtype = entry.models[0].dtype;
  const bool squares = wanted == SQUARES;
  if (!(squares || wanted == GRAM) || call.program.keep != Keep::ALL) return false;
  if (entry.origin().data != nullptr && entry.origin().dtype != dtype) return false;
  for (const View& model : entry.models)
    if (model.dtype != dtype) return false;
  const auto sum = [&]<DType type>() {
    const auto of = [&]<int count, bool diagonal>() {
      sum_unit_products<type, count, diagonal>(call, gram, largest, add_blocks);
      return true;
    };
    switch (call.n_models()) {
      case 1: return of.template operator()<1, true>();
      case 2:
        return squares ? of.template operator()<2, true>() : of.template operator()<2, false>();
      case 3:
        if (squares) return of.template operator()<3, true>();
        // Twelve sums and six constants take more than sixteen registers.
        if constexpr (kLanes > 8) return of.template operator()<3, false>();
    }
    return false;
  };
  switch (dtype) {
    case DType::F32: return false;
    case DType::BF16: return sum.template operator()<DType::BF16>();
    case DType::F16: return sum.template operator()<DType::F16>();
  }
  return false;
}
