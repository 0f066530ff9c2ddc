// The parts of csrc that need no Python: built alone for the thread sanitizer and for aarch64.
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cpu.h"
#include "../../csrc/cpu_count.h"
#include "../../csrc/parallel.h"
#include "../../csrc/patches.h"

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

namespace {

// While set, this thread gets no memory.
thread_local bool t_out_of_memory = false;

}  // namespace

void* operator new(std::size_t size) {
  void* memory = t_out_of_memory ? nullptr : std::malloc(size);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using qvlfast::parallel_for;

template <typename Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Every index once, in pieces cut at multiples of the grain.
void check_pieces(int64_t n, int64_t grain) {
  std::vector<int> seen(static_cast<size_t>(n), 0);
  std::mutex mutex;
  std::set<std::pair<int64_t, int64_t>> pieces;
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      ++seen[static_cast<size_t>(i)];
    }
    const std::lock_guard<std::mutex> lock(mutex);
    pieces.insert({begin, end});
  });
  for (const int count : seen) {
    CHECK(count == 1);
  }
  CHECK(static_cast<int64_t>(pieces.size()) == (n + grain - 1) / grain);
  for (const auto& [begin, end] : pieces) {
    CHECK(begin % grain == 0);
    CHECK(end == std::min(begin + grain, n));
  }
}

void test_pieces() {
  for (const int threads : {1, 2, 3, 8}) {
    qvlfast::set_num_threads(threads);
    CHECK(qvlfast::num_threads() == threads);
    for (const int64_t n : {0, 1, 2, 7, 64, 1000}) {
      for (const int64_t grain : {1, 3, 64, 5000}) {
        check_pieces(n, grain);
      }
    }
  }
  CHECK(!error_of([] { parallel_for(-1, 1, [](int64_t, int64_t) {}); }).empty());
  CHECK(!error_of([] { parallel_for(1, 0, [](int64_t, int64_t) {}); }).empty());
  CHECK(!error_of([] { qvlfast::set_num_threads(0); }).empty());
}

void test_nested_calls_run_in_line() {
  qvlfast::set_num_threads(4);
  std::atomic<int64_t> total{0};
  parallel_for(20, 1, [&](int64_t, int64_t) {
    const std::thread::id outer = std::this_thread::get_id();
    parallel_for(30, 4, [&](int64_t begin, int64_t end) {
      CHECK(std::this_thread::get_id() == outer);
      total += end - begin;
    });
  });
  CHECK(total == 600);
  // Where the outer call has one piece, the inner one is shared.
  parallel_for(1, 1, [&](int64_t, int64_t) { check_pieces(600, 4); });
}

// No memory for a worker: the caller hears of it, and gets its signals as before.
void test_workers_without_memory() {
  qvlfast::set_num_threads(16);  // more than there have been
  sigset_t before;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  bool refused = false;
  t_out_of_memory = true;
  try {
    parallel_for(16, 1, [](int64_t, int64_t) {});
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  t_out_of_memory = false;
  CHECK(refused);
  sigset_t after;
  pthread_sigmask(SIG_SETMASK, nullptr, &after);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) {
    CHECK(sigismember(&before, signal) == 0);
    CHECK(sigismember(&after, signal) == 0);
  }
  check_pieces(64, 1);
}

void test_exceptions_reach_the_caller() {
  qvlfast::set_num_threads(4);
  for (int round = 0; round < 200; ++round) {
    const std::string message = error_of([&] {
      parallel_for(100, 1, [&](int64_t begin, int64_t) {
        if (begin % 10 == round % 10) {
          throw std::runtime_error("piece failed");
        }
      });
    });
    CHECK(message == "piece failed");
  }
  check_pieces(100, 1);
}

void test_many_callers() {
  qvlfast::set_num_threads(4);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([caller] {
      for (int round = 0; round < 100; ++round) {
        check_pieces(50 + caller, 1 + round % 5);
        if (caller == 0) {
          qvlfast::set_num_threads(1 + round % 6);
        }
      }
    });
  }
  for (std::thread& thread : callers) {
    thread.join();
  }
}

// Long enough between two calls that the workers go to sleep.
void test_sleeping_workers_wake() {
  qvlfast::set_num_threads(3);
  for (int round = 0; round < 20; ++round) {
    check_pieces(64, 1);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

void test_fork() {
// Neither the thread sanitizer nor qemu-user 7 follows threads that a child of a fork starts; the
// latter dies of an assertion of its own. Nothing here depends on the processor.
#if !defined(__SANITIZE_THREAD__) && !defined(UNDER_QEMU)
  qvlfast::set_num_threads(3);
  check_pieces(64, 1);
  const pid_t child = fork();
  if (child == 0) {
    check_pieces(64, 1);
    _exit(qvlfast::num_threads() == 3 ? 0 : 1);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  check_pieces(64, 1);
#endif
}

void write_text(const std::filesystem::path& path, const std::string& text) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path) << text;
}

void test_cgroup_quota() {
  std::string name = (std::filesystem::temp_directory_path() / "qvlfast-cgroup-XXXXXX").string();
  CHECK(mkdtemp(name.data()) != nullptr);
  const std::filesystem::path root = name;
  CHECK(qvlfast::cgroup_processors(name, "0::/\n") == 0);
  CHECK(qvlfast::cgroup_processors(name, "") == 0);
  write_text(root / "cpu.max", "max 100000\n");
  CHECK(qvlfast::cgroup_processors(name, "0::/\n") == 0);
  write_text(root / "a" / "cpu.max", "250000 100000\n");
  write_text(root / "a" / "b" / "cpu.max", "800000 100000\n");
  CHECK(qvlfast::cgroup_processors(name, "0::/a/b\n") == 3);
  CHECK(qvlfast::cgroup_processors(name, "0::/a\n") == 3);
  CHECK(qvlfast::cgroup_processors(name, "0::/missing\n") == 0);
  write_text(root / "cpu" / "x" / "cpu.cfs_quota_us", "100000\n");
  write_text(root / "cpu" / "x" / "cpu.cfs_period_us", "100000\n");
  write_text(root / "cpu" / "cpu.cfs_quota_us", "-1\n");
  write_text(root / "cpu" / "cpu.cfs_period_us", "100000\n");
  CHECK(qvlfast::cgroup_processors(name, "5:memory:/x\n4:cpu,cpuacct:/x\n") == 1);
  CHECK(qvlfast::cgroup_processors(name, "4:cpuacct,cpu:/\n") == 0);
  std::filesystem::remove_all(root);
  CHECK(qvlfast::default_num_threads() >= 1);
}

// Computes where each byte of the output comes from, one at a time.
std::vector<uint8_t> naive_patches(const std::vector<uint8_t>& frames,
                                   const qvlfast::PatchShape& s) {
  std::vector<uint8_t> out;
  const int64_t side = s.patch * s.merge;
  for (int64_t time = 0; time < s.frames; time += s.depth())
    for (int64_t top = 0; top < s.height; top += side)
      for (int64_t left = 0; left < s.width; left += side)
        for (int64_t y = top; y < top + side; y += s.patch)
          for (int64_t x = left; x < left + side; x += s.patch)
            for (int64_t channel = 0; channel < 3; ++channel)
              for (int64_t frame = time; frame < time + s.depth(); ++frame)
                for (int64_t row = y; row < y + s.patch; ++row)
                  for (int64_t column = x; column < x + s.patch; ++column) {
                    const int64_t pixel = (frame * s.height + row) * s.width + column;
                    out.push_back(frames[static_cast<size_t>(3 * pixel + channel)]);
                  }
  return out;
}

void check_patches(const qvlfast::PatchShape& shape) {
  shape.check();
  std::vector<uint8_t> frames(static_cast<size_t>(shape.frames * shape.height * shape.width * 3));
  uint32_t state = 1;
  for (uint8_t& value : frames) {
    state = state * 1664525U + 1013904223U;
    value = static_cast<uint8_t>(state >> 24);
  }
  std::vector<uint8_t> out(static_cast<size_t>(shape.rows() * shape.row_bytes()));
  qvlfast::extract_patches(frames.data(), shape, out.data());
  CHECK(out == naive_patches(frames, shape));
}

void test_patches() {
  qvlfast::set_num_threads(3);
  for (const int64_t frames : {1, 2, 6}) {
    for (const int64_t patch : {1, 14, 16, 33}) {
      for (const int64_t merge : {1, 2, 3}) {
        check_patches({frames, 3 * patch * merge, 5 * patch * merge, patch, 2, merge});
      }
    }
  }
  check_patches({4, 320, 480, 16, 2, 2});
  CHECK(!error_of([] { qvlfast::PatchShape{1, 33, 32, 16, 2, 2}.check(); }).empty());
}

void test_cpu() {
  const std::string isa = qvlfast::isa_name(qvlfast::isa());
  std::printf("isa %s, threads %d:", isa.c_str(), qvlfast::default_num_threads());
  for (const auto& [name, present] : qvlfast::cpu_feature_list()) {
    std::printf("%s", present ? (std::string(" ") + name).c_str() : "");
  }
  std::printf("\n");
#if defined(__aarch64__)
  CHECK(isa == "scalar");
  CHECK(qvlfast::cpu_features().neon);
#endif
}

}  // namespace

int main() {
  test_cpu();
  test_pieces();
  test_nested_calls_run_in_line();
  test_workers_without_memory();
  test_exceptions_reach_the_caller();
  test_many_callers();
  test_sleeping_workers_wake();
  test_fork();
  test_cgroup_quota();
  test_patches();
  std::puts("ok");
  return 0;
}
