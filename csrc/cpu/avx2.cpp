#include "headers.hpp"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,popcnt")

#define TVFAST_LANES 8
namespace tvfast::avx2 {
namespace {
#include "lanes/types.hpp"
#include "lanes/avx2.hpp"
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
const Kernels table = kernels("avx2");

}  // namespace tvfast::avx2

#pragma GCC pop_options
