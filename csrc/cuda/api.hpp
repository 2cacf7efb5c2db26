// What bindings may call: the verbs of cpu/api.hpp over a table in device memory. Nothing here
// allocates device memory or waits for the device; workspace and stream are the caller's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../core/moments.hpp"
#include "../core/queries.hpp"
#include "../core/table.hpp"
#include "device_table.hpp"
#include "place.hpp"

namespace tvfast::gpu {

// What of a band has to be tested: of a launch's scalars, which the host knows.
enum class Ends : std::int32_t { LOWER = 0, BOTH = 1 };
Ends ends_of(const Scalars& scalars);

// Writes every entry's `out`, which may be its base or one of its models.
void combine(const DeviceTable& table, const Program& program, const DeviceScalars& scalars,
             Ends ends, Place place);

}  // namespace tvfast::gpu
