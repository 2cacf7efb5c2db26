#include "isa.hpp"

#include <cstdlib>
#include <stdexcept>

#include "api.hpp"

namespace tvfast {

namespace scalar {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#endif
#if defined(TVFAST_EMULATED_ISA)
namespace emulated512 {
extern const Kernels table;
}
#endif

const std::vector<const Kernels*>& runnable_kernels() {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.push_back(&avx512::table);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("popcnt"))
      found.push_back(&avx2::table);
#elif defined(__aarch64__)
    found.push_back(&neon::table);
#endif
    found.push_back(&scalar::table);
#if defined(TVFAST_EMULATED_ISA)
    found.push_back(&emulated512::table);
#endif
    return found;
  }();
  return tables;
}

const Kernels& kernels_for(const std::string& name) {
  const char* forced = std::getenv("TVFAST_ISA");
  const std::string wanted = !name.empty() ? name : forced != nullptr ? forced : "";
  if (wanted.empty()) return *runnable_kernels().front();
  std::string known;
  for (const Kernels* kernels : runnable_kernels()) {
    if (wanted == kernels->name) return *kernels;
    known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("instruction set '" + wanted +
                              "' cannot run here; this build and processor have " + known);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable_kernels()) names.push_back(kernels->name);
  return names;
}

std::string default_isa() { return kernels_for("").name; }

}  // namespace tvfast
