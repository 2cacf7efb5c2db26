// From the kept task vectors of one element to its result: members, reduction and division.
#pragma once

#include "keeping.cuh"

namespace tvfast::gpu {

TVFAST_STAGE F zero_sign(const Program& program, const TensorScalars& tensor) {
  switch (program.zero_sign) {
    case ZeroSign::PLUS: return 1.0f;
    case ZeroSign::MINUS: return -1.0f;
    case ZeroSign::NONE: return 0.0f;
    case ZeroSign::MAJORITY: return tensor.majority;
  }
  return 0.0f;
}

struct Reduced {
  F value, divisor;
};

TVFAST_STAGE void join(const Program& program, Reduced& reduced, F t, F weight, F sign) {
  const F v = t * weight;
  M member = true;
  if (program.vote == Vote::NONE) {
    if (program.members == Members::STRICT) member = not_zero(v);
  } else {
    const F ballot = program.ballot == Ballot::WEIGHTED ? v : t;
    member = program.members == Members::STRICT ? agrees(ballot, sign, false)
                                                : agrees_or_zero(ballot, sign);
  }
  if (program.reduce == Reduce::SUM) reduced.value += masked(member, v);
  if (program.reduce == Reduce::FUSED_SUM)
    reduced.value = __fmaf_rn(masked(member, t), weight, reduced.value);
  if (program.reduce == Reduce::MAX_ABS) reduced.value = larger(reduced.value, v, member);
  if (program.divisor == Divisor::COUNT) reduced.divisor += masked(member, 1.0f);
  if (program.divisor == Divisor::WEIGHT) reduced.divisor += masked(member, weight);
}

TVFAST_STAGE F finish(const Program& program, const TensorScalars& tensor, Reduced reduced,
                      bool has_base, F base) {
  if (program.divisor != Divisor::NONE)
    reduced.value =
        reduced.value / safe_divisor(reduced.divisor, tensor.divisor_floor, tensor.divisor_fill);
  const F result = reduced.value * tensor.scale;
  return has_base ? base + result : result;
}

TVFAST_STAGE Reduced nothing(const Program& program) {
  return {program.reduce == Reduce::MAX_ABS ? 0.0f : -0.0f, 0.0f};
}

}  // namespace tvfast::gpu
