// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace tvfast {

// Tables that this build holds and this processor can run, best first.
const std::vector<const Kernels*>& runnable_kernels();

// The best of them, or the one that TVFAST_ISA names. An empty name asks for that default.
// Throws std::invalid_argument for a name that cannot run here; it never falls back.
const Kernels& kernels_for(const std::string& name);

}  // namespace tvfast
