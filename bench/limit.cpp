// The memory limit that kernels are measured against: read some streams, write one, no arithmetic to speak of. Built with -march=native by
// bench/limit.py and called through ctypes, on the very buffers that the kernels are timed on.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
using Line = __m512i;
inline Line load(const char* p) { return _mm512_loadu_si512(p); }
inline Line mix(Line a, Line b) { return _mm512_xor_si512(a, b); }
inline void stream(char* p, Line v) { _mm512_stream_si512(reinterpret_cast<Line*>(p), v); }
inline std::uint64_t word(Line v) { return static_cast<std::uint64_t>(_mm512_reduce_add_epi64(v)); }
#else
using Line = __m256i;
inline Line load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const Line*>(p)); }
inline Line mix(Line a, Line b) { return _mm256_xor_si256(a, b); }
inline void stream(char* p, Line v) { _mm256_stream_si256(reinterpret_cast<Line*>(p), v); }
inline std::uint64_t word(Line v) { return static_cast<std::uint64_t>(_mm256_extract_epi64(v, 0)); }
#endif

template <int streams, bool writes>
std::uint64_t pass(const char* const* in, char* out, std::size_t begin, std::size_t end) {
  Line sum{};
  for (std::size_t i = begin; i < end; i += sizeof(Line)) {
    Line v = load(in[0] + i);
    for (int s = 1; s < streams; ++s) v = mix(v, load(in[s] + i));
    if (writes) {
      stream(out + i, v);
    } else {
      sum = mix(sum, v);
    }
  }
  _mm_sfence();
  return word(sum);
}

template <int streams>
std::uint64_t pass_of(bool writes, const char* const* in, char* out, std::size_t begin, std::size_t end) {
  return writes ? pass<streams, true>(in, out, begin, end) : pass<streams, false>(in, out, begin, end);
}

}  // namespace

// Reads `streams` (1 to 9) buffers of `bytes` (a multiple of 64 per thread), writes `out` if it is not null.
extern "C" std::uint64_t stream_pass(const char* const* in, int streams, char* out, std::size_t bytes, int n_threads) {
  std::vector<std::uint64_t> sums(n_threads);
  const std::size_t share = bytes / n_threads / 64 * 64;
  const auto work = [&](int t) {
    const std::size_t begin = t * share, end = t + 1 == n_threads ? bytes : begin + share;
    const bool writes = out != nullptr;
    switch (streams) {
      case 1: sums[t] = pass_of<1>(writes, in, out, begin, end); break;
      case 2: sums[t] = pass_of<2>(writes, in, out, begin, end); break;
      case 3: sums[t] = pass_of<3>(writes, in, out, begin, end); break;
      case 4: sums[t] = pass_of<4>(writes, in, out, begin, end); break;
      case 5: sums[t] = pass_of<5>(writes, in, out, begin, end); break;
      case 6: sums[t] = pass_of<6>(writes, in, out, begin, end); break;
      case 7: sums[t] = pass_of<7>(writes, in, out, begin, end); break;
      case 8: sums[t] = pass_of<8>(writes, in, out, begin, end); break;
      case 9: sums[t] = pass_of<9>(writes, in, out, begin, end); break;
    }
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < n_threads; ++t) threads.emplace_back(work, t);
  work(0);
  for (auto& thread : threads) thread.join();
  std::uint64_t sum = 0;
  for (std::uint64_t s : sums) sum += s;
  return sum;
}
