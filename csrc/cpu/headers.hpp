// Everything that an instruction set's file needs, included before its target region opens: a
// standard header inside the region would be compiled for that ISA, and the linker could choose its
// inline functions for everyone.
#pragma once

#if defined(__x86_64__)
// GCC 12 warns about its own undefined-value idiom in this header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>
#include <vector>

#include "../core/philox.hpp"
#include "../core/tie_hash.hpp"
#include "kernels.hpp"

#define TVFAST_INLINE static inline __attribute__((always_inline))
#define TVFAST_INLINE_MEMBER inline __attribute__((always_inline))
#define TVFAST_STAGE static inline __attribute__((always_inline))
