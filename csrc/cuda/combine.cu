// combine: every tensor of a table in one launch, one pass from storage to storage.
#include <algorithm>
#include <limits>

#include "api.hpp"
#include "merging.cuh"
#include "tiles.cuh"

namespace tvfast::gpu {

namespace {

// Quads of any types and alignment.
template <class Choice, int kModels, bool exact>
TVFAST_STAGE void merge_loaded(const Merge<kModels>& merge, std::int64_t i, int n, bool whole) {
  const DeviceEntry& entry = merge.entry;
  const Quad quad{i, static_cast<std::uint64_t>(entry.offset + i), n, whole};
  F result[kQuad];
  merge_any<Choice, kModels, exact>(
      merge, quad,
      [&](int k, F* x) { load_quad(k < 0 ? entry.base : merge.models[k].model, i, n, whole, x); },
      result);
  store_quad(entry.out, entry.out_dtype, i, n, whole, result);
}

// Packets of one 16-bit type: all are asked for before the first is used.
template <class Choice, int kModels, bool exact, DType dtype>
TVFAST_STAGE void merge_packets(const Merge<kModels>& merge, const TileSpan& span) {
  const DeviceEntry& entry = merge.entry;
  const int n_models = exact ? kModels : merge.n_models;
  constexpr int kStep = 2 * kQuad;
#pragma unroll 1
  for (std::int64_t i = span.body + kStep * static_cast<int>(threadIdx.x); i < span.body_end;
       i += kStep * static_cast<int>(blockDim.x)) {
    Packet base{}, packets[kModels];
    if (entry.base.data != nullptr) base = load_packet(entry.base.data, i);
#pragma unroll
    for (int k = 0; k < kModels; ++k)
      if (k < n_models) packets[k] = load_packet(merge.models[k].model.data, i);
    uint2 halves[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t at = i + kQuad * half;
      const Quad quad{at, static_cast<std::uint64_t>(entry.offset + at), kQuad, true};
      F result[kQuad];
      merge_any<Choice, kModels, exact>(
          merge, quad,
          [&](int k, F* x) {
            if (k < 0) {
              unpack<dtype>(base, half, x);
            } else {
#pragma unroll
              for (int m = 0; m < kModels; ++m)
                if (m == k) unpack<dtype>(packets[m], half, x);
            }
          },
          result);
      halves[half] = pack<dtype>(result);
    }
    __stcs(reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(entry.out) + i),
           uint4{halves[0].x, halves[0].y, halves[1].x, halves[1].y});
  }
}

// A fixed choice merges packets of 16-bit types on a path of its own. A choice at run time takes
// quads of any types, and so do more models, whose packets would leave too few registers: as many
// bytes are on their way with twice the threads.
template <class Choice, int kModels>
inline constexpr bool kPackets = !Choice::kAtRunTime && kModels >= 1 && kModels <= 4;

// Kernels that may be asked to merge some entries of a table alone: those of merges with guesses.
template <class Choice, bool exact>
inline constexpr bool kMergesSome = exact || Choice::kAtRunTime;

// As many blocks as leave the registers that a kernel needs: fewer for more models and for a
// program that is read at run time. ptxas needs a few registers more for sm_80.
template <class Choice, int kModels, bool exact>
constexpr int blocks_per_multiprocessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr int kFewer = 1;
#else
  constexpr int kFewer = 0;
#endif
  constexpr int kHalf = kBlocksPerMultiprocessor / 2;
  if (Choice::kAtRunTime) return kModels == 8 || (kModels == 0 && Choice::kScores) ? 1 : kHalf;
  // Scores are twice the bytes of 16-bit weights: as many are on their way with fewer threads.
  if (Choice::kScores && kModels != 1) return kModels == 2 ? kBlocksPerMultiprocessor - 1 : kHalf;
  if (!exact) return kBlocksPerMultiprocessor - 1 - kFewer;
  if (kModels == 4) return kBlocksPerMultiprocessor - 1;
  return kModels == 3 && Choice::kEnds == Ends::LOWER ? kBlocksPerMultiprocessor - kFewer
                                                      : kBlocksPerMultiprocessor;
}

template <class Choice, int kModels, bool exact>
__global__ void __launch_bounds__(kThreads, (blocks_per_multiprocessor<Choice, kModels, exact>()))
    combine_kernel(DeviceTable table, DeviceScalars scalars, Program program, Gate gate,
                   Trial trial) {
  if (gate.flag != nullptr && (*gate.flag != 0) != gate.set) return;
  if (gate.any != nullptr && *gate.any == 0) return;
  // As bytes: shared memory is not initialised, and the scalars' defaults would be.
  alignas(16) __shared__ unsigned char storage[sizeof(TileScalars<kModels>)];
  auto& tile_scalars = *reinterpret_cast<TileScalars<kModels>*>(storage);
  __shared__ TileCounts counts;
  for (std::int64_t tile = blockIdx.x; tile < table.n_tiles; tile += gridDim.x) {
    const TileSpan span = span_of(table, tile);
    if constexpr (kMergesSome<Choice, exact>) {
      if (gate.left != nullptr && (gate.left[span.entry] != 0) != gate.merges_left) continue;
    }
    const std::int64_t first_model = std::int64_t{span.entry} * table.n_models;
    const ModelScalars* all_scalars = scalars.models + first_model;
    const DeviceModel* models = table.models + first_model;
    __syncthreads();
    if (threadIdx.x == 0) {
      tile_scalars.entry = table.entries[span.entry];
      tile_scalars.tensor = scalars.tensors[span.entry];
    }
    if constexpr (Choice::kCounts) clear(counts);
    if constexpr (kModels > 0) {
      const int k = static_cast<int>(threadIdx.x);
      if (k < table.n_models) {
        tile_scalars.views[k] = models[k];
        tile_scalars.models[k] = all_scalars[k];
        tile_scalars.ends[k] = lower_end(all_scalars[k]);
      }
    }
    __syncthreads();
    if constexpr (kModels > 0) models = tile_scalars.views;
    const DeviceEntry& entry = tile_scalars.entry;
    Tally tally;
    const Merge<kModels> merge{program, tile_scalars,   all_scalars, entry,
                               models,  table.n_models, tally};
    bool packed = false;
    if constexpr (kPackets<Choice, kModels>) {
      packed = entry.form == Form::PACKED_BF16 || entry.form == Form::PACKED_F16;
      if (entry.form == Form::PACKED_BF16)
        merge_packets<Choice, kModels, exact, DType::BF16>(merge, span);
      if (entry.form == Form::PACKED_F16)
        merge_packets<Choice, kModels, exact, DType::F16>(merge, span);
    }
    for_each(entry, span, !packed, [&](std::int64_t i, int n, bool whole) {
      merge_loaded<Choice, kModels, exact>(merge, i, n, whole);
    });
    if constexpr (Choice::kCounts) add_tally(trial, first_model, table.n_models, tally, counts);
  }
}

using CombineKernel = void (*)(DeviceTable, DeviceScalars, Program, Gate, Trial);

template <class Choice>
CombineKernel for_model_count(int n_models) {
  switch (n_models) {
    case 1: return combine_kernel<Choice, 1, true>;
    case 2: return combine_kernel<Choice, 2, true>;
    case 3: return combine_kernel<Choice, 3, true>;
    case 4: return combine_kernel<Choice, 4, true>;
    default: return n_models <= 8 ? combine_kernel<Choice, 8, false> : nullptr;
  }
}

// With more than four models, a program that reads scores reads them again where it needs them
// again: held in registers, they are three times the text of everything else.
template <bool scores>
CombineKernel for_any_program(int n_models) {
  if (n_models <= 4) return combine_kernel<AtRunTime<scores>, 4, false>;
  if constexpr (!scores) {
    if (n_models <= 8) return combine_kernel<AtRunTime<scores>, 8, false>;
  }
  return combine_kernel<AtRunTime<scores>, 0, false>;
}

constexpr Program kSum{};
constexpr Program kFusedSum{.reduce = Reduce::FUSED_SUM};
constexpr Program kFusedMean{.reduce = Reduce::FUSED_SUM, .divisor = Divisor::WEIGHT};

constexpr Program kMeanByScore{.divisor = Divisor::WEIGHT, .weighting = Weighting::SCORE};

constexpr Program masked_by_score(Tie tie) { return {.keep = Keep::SCORE, .tie = tie}; }

constexpr Program ties(Tie tie, Divisor divisor) {
  return {.keep = Keep::BAND,
          .tie = tie,
          .vote = Vote::MASS,
          .ballot = divisor == Divisor::WEIGHT ? Ballot::WEIGHTED : Ballot::RAW,
          .members = Members::STRICT,
          .divisor = divisor};
}

// The program with what it does not read set to the first choice.
Program canonical(Program p) {
  if (p.keep == Keep::ALL || p.keep == Keep::MASK || p.keep == Keep::RANDOM || uses_ranks(p.keep))
    p.tie = Tie::GE;
  if (p.keep != Keep::SCORE) p.cross = Cross::NONE;
  if (p.vote == Vote::NONE) {
    p.ballot = Ballot::RAW;
    p.zero_sign = ZeroSign::PLUS;
  }
  return p;
}

template <Program program, Ends ends>
CombineKernel if_fixed(const Program& asked, Ends tested, int n_models) {
  if (!(asked == program) || tested > ends) return nullptr;
  return for_model_count<Fixed<program, ends>>(n_models);
}

template <Divisor divisor>
CombineKernel if_guessed(const Program& asked, int n_models) {
  constexpr Program program = ties(Tie::GE, divisor);
  if (!(asked == program)) return nullptr;
  switch (n_models) {
    case 2: return combine_kernel<Guessed<program>, 2, true>;
    case 3: return combine_kernel<Guessed<program>, 3, true>;
    case 4: return combine_kernel<Guessed<program>, 4, true>;
    default: return nullptr;
  }
}

// The kernel that merges with guesses and counts what proves them; none for most programs.
CombineKernel choose_guessed(const Program& program, Ends ends, int n_models) {
  if (ends != Ends::LOWER) return nullptr;
  const Program p = canonical(program);
  const CombineKernel found = if_guessed<Divisor::WEIGHT>(p, n_models);
  return found != nullptr ? found : if_guessed<Divisor::COUNT>(p, n_models);
}

CombineKernel choose(const Program& program, Ends ends, int n_models) {
  const Program p = canonical(program);
  CombineKernel found = nullptr;
  const auto otherwise = [&](CombineKernel next) {
    if (found == nullptr) found = next;
  };
  if (p.keep == Keep::ALL) {
    otherwise(if_fixed<kSum, Ends::BOTH>(p, ends, n_models));
    otherwise(if_fixed<kFusedSum, Ends::BOTH>(p, ends, n_models));
    otherwise(if_fixed<kFusedMean, Ends::BOTH>(p, ends, n_models));
    otherwise(if_fixed<kMeanByScore, Ends::BOTH>(p, ends, n_models));
  } else if (p.keep == Keep::BAND) {
    otherwise(if_fixed<ties(Tie::GE, Divisor::WEIGHT), Ends::LOWER>(p, ends, n_models));
    otherwise(if_fixed<ties(Tie::GE, Divisor::COUNT), Ends::LOWER>(p, ends, n_models));
    otherwise(if_fixed<ties(Tie::HASH, Divisor::WEIGHT), Ends::LOWER>(p, ends, n_models));
    otherwise(if_fixed<ties(Tie::HASH, Divisor::COUNT), Ends::LOWER>(p, ends, n_models));
  } else if (p.keep == Keep::SCORE) {
    otherwise(if_fixed<masked_by_score(Tie::GE), Ends::LOWER>(p, ends, n_models));
    otherwise(if_fixed<masked_by_score(Tie::HASH), Ends::LOWER>(p, ends, n_models));
  }
  otherwise(reads_scores(p) ? for_any_program<true>(n_models) : for_any_program<false>(n_models));
  return found;
}

}  // namespace

Ends ends_of(const Scalars& scalars) {
  const float infinity = std::numeric_limits<float>::infinity();
  const bool lower =
      std::all_of(scalars.models.begin(), scalars.models.end(), [=](const ModelScalars& s) {
        return s.hi == infinity && s.hi_cut == 0 && s.lo >= 0.0f && s.lo < infinity;
      });
  return lower ? Ends::LOWER : Ends::BOTH;
}

void combine(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
             Ends ends, Place place, Gate gate) {
  const OnDevice current(place.device);
  launch_tiles(choose(program, ends, table.n_models), table, place, scalars, program, gate,
               Trial{});
}

void combine_placed(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
                    Ends ends, const Verdicts& found, const std::uint32_t* left, Place place) {
  const bool tested =
      choose(program, ends, table.n_models) == choose(program, Ends::BOTH, table.n_models);
  Gate gate;
  if (left != nullptr) gate = {.any = &found.left, .left = left};
  if (!tested) gate.flag = &found.both_ends, gate.set = false;
  combine(table, program, scalars, ends, place, gate);
  gate.set = true;
  if (!tested) combine(table, program, scalars, Ends::BOTH, place, gate);
}

bool can_guess(const Program& program, Ends ends, int n_models) {
  return choose_guessed(program, ends, n_models) != nullptr;
}

void combine_guessed(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
                     const Verdicts& found, const std::uint32_t* left, Trial trial, Place place) {
  const OnDevice current(place.device);
  const Gate gate{.any = &found.tried, .left = left, .merges_left = false};
  launch_tiles(choose_guessed(program, Ends::LOWER, table.n_models), table, place, scalars, program,
               gate, trial);
}

}  // namespace tvfast::gpu
