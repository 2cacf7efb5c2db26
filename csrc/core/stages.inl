// The arithmetic of every stage, on the lane types of the namespace that includes it: F, M, U and
// the functions select, masked, invert, magnitude, bits, from_bits, is_nan, splat. SIMD and CUDA
// compile these lines; docs/numerics.md is their text in words. No include guard on purpose.
// TVFAST_STAGE carries the inlining and device attributes.

// keep

// Each inversion becomes an unordered comparison.
TVFAST_STAGE M from_end(F a, F lo) { return invert(a < lo); }
TVFAST_STAGE M in_band(F a, F lo, F hi) { return from_end(a, lo) & invert(a > hi); }

TVFAST_STAGE M in_band_ties(F a, F lo, F hi, M under_lo_cut, M under_hi_cut) {
  return in_band(a, lo, hi) & invert((a == lo) & invert(under_lo_cut)) &
         invert((a == hi) & under_hi_cut);
}

// An index mixed, which is the same for every model; `scaled` is the index's two words times their
// constants, see docs/numerics.md.
TVFAST_STAGE U mixed_index(U scaled) {
  U x = scaled;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// `multiplier` is made of the model's key and odd.
TVFAST_STAGE U tie_hash(U mixed, U multiplier) { return mixed * multiplier; }

// The lower end of a band whose ties are resolved: an entry that loses the tie has to exceed `lo`.
TVFAST_STAGE M from_end_hashed(F a, F lo, F above_lo, M loses_tie) {
  return invert(a < select(loses_tie, above_lo, lo));
}

// scores

// NaN is above the floor.
TVFAST_STAGE F mapped_score(F score, F scale, F shift, F floor) {
  const F mapped = score * scale + shift;
  return select(mapped < floor, floor, mapped);
}

// A score that no band holds where another model's entry takes this one's place.
TVFAST_STAGE F unless_lost(F score, M lost) { return select(lost, splat(-1.0f), score); }

// weights

// How much of y replaces x: all of it where they are no farther apart than `limit`.
TVFAST_STAGE F nearness(F x, F y, F limit, F floor) {
  const F apart = magnitude(x - y);
  const F share = splat(1.0f) / select(apart < floor, floor, apart) * limit;
  const F least = select(share < splat(0.0f), splat(0.0f), share);
  return select(least > splat(1.0f), splat(1.0f), least);
}

// Of a model's entry where `n_present` models have one.
TVFAST_STAGE F weight_alone(F n_present, F weight) {
  return select(n_present == splat(1.0f), weight, splat(1.0f));
}

// vote

TVFAST_STAGE F sign_of(F x) {
  return select(x > splat(0.0f), splat(1.0f), select(x < splat(0.0f), splat(-1.0f), splat(0.0f)));
}

TVFAST_STAGE F elected(F votes, F zero) {
  return select(votes > splat(0.0f), splat(1.0f), select(votes < splat(0.0f), splat(-1.0f), zero));
}

// members

// Non-zero and of the elected sign. `sign_is_never_zero` is known before the loop, from the zero
// rule.
TVFAST_STAGE M agrees(F ballot, F sign, bool sign_is_never_zero) {
  const F turned = from_bits(bits(ballot) ^ (bits(sign) & splat_bits(0x80000000u)));
  const M same = invert(turned <= splat(0.0f));
  if (sign_is_never_zero) return same;
  return (same & invert(sign == splat(0.0f))) | is_nan(ballot);
}

TVFAST_STAGE M agrees_or_zero(F ballot, F sign) {
  return (sign_of(ballot) == sign) | is_nan(ballot);
}

TVFAST_STAGE M not_zero(F v) { return invert(v == splat(0.0f)); }

// reduce

// The magnitudes compare as integers, so that NaN is above all.
TVFAST_STAGE F larger(F best, F v, M member) {
  const M wins = from_unsigned(bits(magnitude(v))) >= from_unsigned(bits(magnitude(best)));
  return select(member & wins, v, best);
}

TVFAST_STAGE F safe_divisor(F divisor, F floor, F fill) {
  return select(magnitude(divisor) < floor, fill, divisor);
}
