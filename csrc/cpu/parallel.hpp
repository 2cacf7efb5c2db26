// Runs tasks on the threads of one call. Tasks are taken from a counter, so a core that is busy
// elsewhere delays one task and not a share of the work. Threads live as long as the call: a pool
// that outlives it would be dead in a forked child, and a call that is worth threads runs for
// milliseconds.
#pragma once

#include <cstdint>
#include <functional>

namespace tvfast {

// Cores this process may run on.
int available_threads();

// fn(task, thread) for every task in [0, n_tasks), thread in [0, n_threads). The first exception is
// thrown here after all threads have stopped. n_threads <= 0 means available_threads().
int parallel_threads(std::int64_t n_tasks, int n_threads);
void parallel_for(std::int64_t n_tasks, int n_threads,
                  const std::function<void(std::int64_t task, int thread)>& fn);

}  // namespace tvfast
