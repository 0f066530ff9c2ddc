// How many processors this process may use.
#pragma once

#include <string>

namespace qvlfast {

// The cgroup quota in processors, rounded up, or 0 where there is none. `root` is where cgroups are
// mounted (/sys/fs/cgroup) and `self` is the text of /proc/self/cgroup. Versions 1 and 2.
int cgroup_processors(const std::string& root, const std::string& self);

// QVLFAST_THREADS where it is set; otherwise the affinity mask, cut by the cgroup quota.
// Throws std::invalid_argument when QVLFAST_THREADS is not a number in 1..kMaxThreads.
int default_num_threads();

}  // namespace qvlfast
