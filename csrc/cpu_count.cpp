#include "cpu_count.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "parallel.h"

namespace qvlfast {
namespace {

constexpr int kNoLimit = 0;

int tighter(int a, int b) {
  if (a == kNoLimit || b == kNoLimit) {
    return std::max(a, b);
  }
  return std::min(a, b);
}

std::string read_text(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// From a quota and a period in µs; a missing file gives zeros and version 1 writes -1 for no quota.
int processors(double quota, double period) {
  if (quota <= 0 || period <= 0) {
    return kNoLimit;
  }
  return static_cast<int>(std::min(quota / period + 0.999, static_cast<double>(kMaxThreads)));
}

int limit_v2(const std::string& folder) {
  // "150000 100000", or "max 100000" which does not read as a number.
  std::istringstream text(read_text(folder + "/cpu.max"));
  double quota = 0;
  double period = 0;
  text >> quota >> period;
  return processors(quota, period);
}

int limit_v1(const std::string& folder) {
  double quota = 0;
  double period = 0;
  std::istringstream(read_text(folder + "/cpu.cfs_quota_us")) >> quota;
  std::istringstream(read_text(folder + "/cpu.cfs_period_us")) >> period;
  return processors(quota, period);
}

// A group is also held by the limits of all groups above it.
template <typename Limit>
int limit_upwards(const std::string& root, std::string path, Limit limit) {
  int least = kNoLimit;
  while (!path.empty() && path != "/") {
    least = tighter(least, limit(root + path));
    path.erase(path.rfind('/'));
  }
  return tighter(least, limit(root));
}

int affinity_processors() {
  // The mask of the kernel may be wider than cpu_set_t; it says EINVAL until ours is wide enough.
  for (size_t width = CPU_SETSIZE; width <= (size_t{1} << 20); width *= 2) {
    cpu_set_t* mask = CPU_ALLOC(width);
    if (mask == nullptr) {
      break;
    }
    const size_t bytes = CPU_ALLOC_SIZE(width);
    const bool known = sched_getaffinity(0, bytes, mask) == 0;
    const bool too_narrow = !known && errno == EINVAL;
    const int count = known ? CPU_COUNT_S(bytes, mask) : 0;
    CPU_FREE(mask);
    if (known) {
      return count;
    }
    if (!too_narrow) {
      break;
    }
  }
  return static_cast<int>(std::thread::hardware_concurrency());
}

int threads_from_environment(const std::string& value) {
  char* end = nullptr;
  errno = 0;
  const long n = std::strtol(value.c_str(), &end, 10);
  if (errno != 0 || *end != '\0' || n < 1 || n > kMaxThreads) {
    throw std::invalid_argument("QVLFAST_THREADS must be a whole number in 1.." +
                                std::to_string(kMaxThreads) + ", got '" + value + "'");
  }
  return static_cast<int>(n);
}

}  // namespace

int cgroup_processors(const std::string& root, const std::string& self) {
  int least = kNoLimit;
  std::istringstream lines(self);
  std::string line;
  while (std::getline(lines, line)) {
    // "hierarchy:controllers:path", and "0::path" for version 2: cgroups(7).
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) {
      continue;
    }
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") {
      least = tighter(least, limit_upwards(root, path, limit_v2));
    } else if (controllers.find(",cpu,") != std::string::npos) {
      least = tighter(least, limit_upwards(root + "/cpu", path, limit_v1));
    }
  }
  return least;
}

int default_num_threads() {
  const char* wanted = std::getenv("QVLFAST_THREADS");
  if (wanted != nullptr && *wanted != '\0') {
    return threads_from_environment(wanted);
  }
  const int quota = cgroup_processors("/sys/fs/cgroup", read_text("/proc/self/cgroup"));
  return std::clamp(tighter(affinity_processors(), quota), 1, kMaxThreads);
}

}  // namespace qvlfast
