// A search for infinities and NaN in storage. No include guard on purpose.

// Index of the first of `n` words whose exponent has all its bits set, or -1. The magnitudes of a
// block are compared at once: only the largest matters.
template <class Word>
static std::int64_t first_nonfinite_word(const unsigned char* p, std::int64_t n, Word exponent) {
  typedef Word V __attribute__((vector_size(4 * TVFAST_LANES)));
  constexpr std::int64_t kWords = sizeof(V) / sizeof(Word), kWordsOfBlock = 32 * kWords;
  const Word magnitude = static_cast<Word>(~Word{0}) >> 1;
  const auto larger = [](V a, V b) __attribute__((always_inline)) { return a > b ? a : b; };
  std::int64_t i = 0;
  for (; i + kWordsOfBlock <= n; i += kWordsOfBlock) {
    V even = {}, odd = {};
    for (std::int64_t j = i; j < i + kWordsOfBlock; j += 2 * kWords) {
      even = larger(even, load<V>(p + j * sizeof(Word)) & magnitude);
      odd = larger(odd, load<V>(p + (j + kWords) * sizeof(Word)) & magnitude);
    }
    Word lanes[kWords];
    store(lanes, larger(even, odd));
    if (*std::max_element(lanes, lanes + kWords) >= exponent) break;
  }
  for (; i < n; ++i)
    if ((load<Word>(p + i * sizeof(Word)) & magnitude) >= exponent) return i;
  return -1;
}

static std::int64_t first_nonfinite_of(const void* data, std::int64_t n, DType dtype) {
  const auto* p = static_cast<const unsigned char*>(data);
  switch (dtype) {
    case DType::F32: return first_nonfinite_word<std::uint32_t>(p, n, 0x7f800000u);
    case DType::BF16: return first_nonfinite_word<std::uint16_t>(p, n, 0x7f80u);
    case DType::F16: return first_nonfinite_word<std::uint16_t>(p, n, 0x7c00u);
  }
  return -1;
}
