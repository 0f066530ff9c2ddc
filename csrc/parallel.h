// One thread pool for all kernels.
#pragma once

#include <cstdint>
#include <functional>

namespace qvlfast {

// Threads that share the work of one `parallel_for`, the caller's own among them.
// At first: QVLFAST_THREADS, else the processors of the affinity mask, or fewer where the cgroup
// has a quota. Throws std::invalid_argument when QVLFAST_THREADS is not in 1..kMaxThreads.
constexpr int kMaxThreads = 1024;
int num_threads();

// Throws std::invalid_argument unless n is in 1..kMaxThreads.
void set_num_threads(int n);

// Calls fn(begin, end) for the pieces [0, grain), [grain, 2 grain), … of [0, n), and returns when
// all are done. Where the pieces are cut depends on n and grain alone, never on the threads.
// May be called from several threads at a time, and after fork. Within fn it runs in line, unless
// the outer call has but one piece.
// The first exception out of fn is thrown again here; pieces not begun by then are dropped.
// Throws std::invalid_argument for n < 0 or grain < 1.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& fn);

}  // namespace qvlfast
