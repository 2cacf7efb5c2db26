// Services over plain memory: checksums and a search for values that are not finite.
#include "api.hpp"
#include "isa.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

#include <array>
#include <cstring>

namespace tvfast {

namespace {

// The Castagnoli polynomial, lowest power of x in the highest bit; so are all remainders here.
constexpr std::uint32_t kPolynomial = 0x82F63B78u;

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// tables[j][byte]: what the byte adds when j more bytes follow it.
constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) ? kPolynomial : 0u);
    tables[0][byte] = crc;
  }
  for (std::size_t j = 1; j < 8; ++j)
    for (std::size_t byte = 0; byte < 256; ++byte)
      tables[j][byte] = (tables[j - 1][byte] >> 8) ^ tables[0][tables[j - 1][byte] & 0xffu];
  return tables;
}

constexpr Tables kTables = make_tables();

std::uint64_t load_word(const unsigned char* p) {
  std::uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// Eight bytes a step, on any processor of the byte order that safetensors has.
std::uint32_t update_by_tables(std::uint32_t crc, const unsigned char* p, std::size_t n) {
  for (; n >= 8; p += 8, n -= 8) {
    const std::uint64_t word = load_word(p) ^ crc;
    crc = 0;
    for (int j = 0; j < 8; ++j) crc ^= kTables[7 - j][(word >> (8 * j)) & 0xffu];
  }
  for (; n > 0; ++p, --n) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 0xffu];
  return crc;
}

// a * b modulo the polynomial.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (int bit = 31; bit >= 0; --bit) {
    if ((a >> bit) & 1u) product ^= b;
    b = (b >> 1) ^ ((b & 1u) ? kPolynomial : 0u);
  }
  return product;
}

// x^n modulo the polynomial.
constexpr std::uint32_t power(std::uint64_t n) {
  std::uint32_t result = 0x80000000u, square = 0x40000000u;
  for (; n > 0; n >>= 1, square = multiply(square, square))
    if (n & 1u) result = multiply(result, square);
  return result;
}

#if defined(__x86_64__) || defined(__aarch64__)
#define TVFAST_CRC_INSTRUCTION

#pragma GCC push_options
#if defined(__x86_64__)
#pragma GCC target("sse4.2,pclmul")

bool has_instruction() {
  return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

inline std::uint32_t step(std::uint32_t crc, std::uint64_t word) {
  return static_cast<std::uint32_t>(_mm_crc32_u64(crc, word));
}
inline std::uint32_t step_byte(std::uint32_t crc, unsigned char byte) {
  return _mm_crc32_u8(crc, byte);
}

// Appends n zero bytes to a message. The instruction multiplies by x^32, and the carry-less product
// of two mirrored words is off by one more x.
template <std::uint64_t n>
inline std::uint32_t append_zeros(std::uint32_t crc) {
  constexpr std::uint32_t factor = power(8 * n - 33);
  const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(crc)),
                                               _mm_cvtsi32_si128(static_cast<int>(factor)), 0);
  return step(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(product)));
}

#else
#pragma GCC target("+crc")

bool has_instruction() { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

inline std::uint32_t step(std::uint32_t crc, std::uint64_t word) { return __crc32cd(crc, word); }
inline std::uint32_t step_byte(std::uint32_t crc, unsigned char byte) {
  return __crc32cb(crc, byte);
}
template <std::uint64_t n>
inline std::uint32_t append_zeros(std::uint32_t crc) {
  return multiply(crc, power(8 * n));
}

#endif

// The instruction takes one word a cycle but answers after three: three parts of a block at a time.
template <std::size_t part>
inline std::uint32_t update_blocks(std::uint32_t crc, const unsigned char*& p, std::size_t& n) {
  for (; n >= 3 * part; p += 3 * part, n -= 3 * part) {
    std::uint32_t first = crc, second = 0, third = 0;
    for (std::size_t i = 0; i < part; i += 8) {
      first = step(first, load_word(p + i));
      second = step(second, load_word(p + part + i));
      third = step(third, load_word(p + 2 * part + i));
    }
    crc = append_zeros<2 * part>(first) ^ append_zeros<part>(second) ^ third;
  }
  return crc;
}

std::uint32_t update_by_instruction(std::uint32_t crc, const unsigned char* p, std::size_t n) {
  crc = update_blocks<8192>(crc, p, n);
  crc = update_blocks<256>(crc, p, n);
  for (; n >= 8; p += 8, n -= 8) crc = step(crc, load_word(p));
  for (; n > 0; ++p, --n) crc = step_byte(crc, *p);
  return crc;
}

#pragma GCC pop_options
#endif

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t n_bytes, std::uint32_t seed) {
  const auto* p = static_cast<const unsigned char*>(data);
#if defined(TVFAST_CRC_INSTRUCTION)
  static const bool instruction = has_instruction();
  if (instruction && kernels_for("").lanes > 1) return ~update_by_instruction(~seed, p, n_bytes);
#endif
  return ~update_by_tables(~seed, p, n_bytes);
}

std::uint32_t crc32c_combine(std::uint32_t a, std::uint32_t b, std::uint64_t n_bytes_b) {
  // The factor is x^(8 n), but 8 n may not fit in 64 bits.
  std::uint32_t shifted = a, square = power(8);
  for (std::uint64_t n = n_bytes_b; n > 0; n >>= 1, square = multiply(square, square))
    if (n & 1u) shifted = multiply(shifted, square);
  return shifted ^ b;
}

std::int64_t first_nonfinite(const void* data, std::int64_t n, DType dtype) {
  return kernels_for("").first_nonfinite(data, n, dtype);
}

}  // namespace tvfast
