#include "headers.hpp"

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,popcnt,prefer-vector-width=512")

#define TVFAST_LANES 16
namespace tvfast::avx512 {
namespace {
#include "lanes/types.hpp"
#include "lanes/avx512.hpp"
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
const Kernels table = kernels("avx512");

}  // namespace tvfast::avx512

#pragma GCC pop_options
