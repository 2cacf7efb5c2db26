// The smallest test frame: a failed check prints itself and the program returns 1; without the
// instruction set that TVFAST_ISA names it returns 77, which ctest lists as skipped.
#pragma once

#include <cstdio>
#include <exception>
#include <stdexcept>

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++failures();                                                                \
    }                                                                              \
  } while (false)

template <class Fn>
int run(Fn&& tests) {
  try {
    tests();
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 77;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "unexpected: %s\n", error.what());
    return 1;
  }
  return failures() == 0 ? 0 : 1;
}
