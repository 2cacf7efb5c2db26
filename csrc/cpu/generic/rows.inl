// Rows of matrices, a run of elements at a time. No include guard on purpose.

template <DType dtype>
static void widen_run_of(const void* from, std::int64_t n, float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load_as_float<dtype>(from, i));
  for (; i < n; ++i) {
    const F x = load_partial<dtype>(from, i, 1);
    std::memcpy(out + i, &x, sizeof(float));
  }
}

// Exactly n floats. They may be written over what they are made of, if both end at one place: a
// vector is loaded before it is stored, and what is stored ends before what is left.
static void widen_run(const void* from, DType dtype, std::int64_t n, float* out) {
  switch (dtype) {
    case DType::F32: std::memmove(out, from, static_cast<std::size_t>(n) * sizeof(float)); break;
    case DType::BF16: widen_run_of<DType::BF16>(from, n, out); break;
    case DType::F16: widen_run_of<DType::F16>(from, n, out); break;
  }
}

// The mean of some runs: their sum from the first on, then one division.
static void mean_run(const float* const* runs, int n_runs, std::int64_t n, float* out) {
  const float divisor = static_cast<float>(n_runs);
  const auto mean = [=](std::int64_t i, auto&& get) {
    auto sum = get(runs[0] + i);
    for (int k = 1; k < n_runs; ++k) sum += get(runs[k] + i);
    return sum / divisor;
  };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, mean(i, [](const float* p) { return load<F>(p); }));
  for (; i < n; ++i) out[i] = mean(i, [](const float* p) { return load<float>(p); });
}

// Adds each row of a matrix of floats to a row of sums, from the first on.
static void add_rows(const float* matrix, std::int64_t n_rows, std::int64_t row, double* sums) {
  for (std::int64_t r = 0; r < n_rows; ++r)
    for (std::int64_t i = 0; i < row; ++i) sums[i] += static_cast<double>(matrix[r * row + i]);
}
