// The 512-bit lanes without a target region: the compiler lowers each vector to what the baseline
// has. Tests compare it with the other tables on processors that lack AVX-512; releases do not hold
// it.
#if defined(TVFAST_EMULATED_ISA)

#include "headers.hpp"

#define TVFAST_LANES 16
namespace tvfast::emulated512 {
namespace {
#include "lanes/types.hpp"
#include "lanes/portable.hpp"
#include "lanes/convert.hpp"
#include "../core/stages.inl"
#include "generic/rank.inl"
#include "generic/draws.inl"
#include "generic/stage_block.inl"
#include "generic/combine.inl"
#include "generic/fused.inl"
#include "generic/host.inl"
#include "generic/sums.inl"
#include "generic/gram.inl"
#include "generic/measure.inl"
#include "generic/multiply.inl"
#include "generic/rows.inl"
#include "generic/score.inl"
#include "generic/kron.inl"
#include "generic/low_rank.inl"
#include "generic/divergence.inl"
#include "generic/drop.inl"
#include "generic/fp8.inl"
#include "generic/table.inl"
}  // namespace

extern const Kernels table;
const Kernels table = kernels("emulated512");

}  // namespace tvfast::emulated512

#endif
