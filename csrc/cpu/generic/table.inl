// What one instruction set exports. Included last; no include guard on purpose.

static constexpr Kernels kernels(const char* name) {
  return {.name = name,
          .lanes = kLanes,
          .combine = combine_tile,
          .measure = measure_tile,
          .rank_row = rank_row,
          .keys = keys_block,
          .scan_taus = scan_taus,
          .scan = scan_keys,
          .count_equal = count_equal,
          .first_nonfinite = first_nonfinite_of,
          .widen_run = widen_run,
          .mean_run = mean_run,
          .add_rows = add_rows,
          .score = score_tile,
          .factored = factored_tile,
          .kron = kron_tile,
          .finish_rows = finish_rows,
          .add_low_rank = add_low_rank_tile,
          .divergence_of_row = divergence_of_row,
          .fuse_run = fuse_run,
          .count_magnitudes = count_magnitudes,
          .drop_binned = drop_binned,
          .widen_fp8 = widen_fp8_run,
          .largest_finite = largest_finite_of,
          .narrow_fp8 = narrow_fp8_run};
}
