#include "parallel.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu_count.h"

namespace qvlfast {
namespace {

// Longer than the gap between two kernels of one forward pass, since waking a thread can take as
// long as a small kernel, and short enough that an idle server does not show up in `top`.
constexpr std::chrono::microseconds kSpinTime(200);

void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}

// Waits for a short time until `done`; whether it came.
template <class Done>
bool spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) {
        return true;
      }
      spin_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

// True while this thread runs pieces of a shared call, so that a nested one runs in line.
thread_local bool t_inside = false;

struct Job {
  const std::function<void(int64_t, int64_t)>& fn;
  const int64_t n;
  const int64_t grain;
  const int64_t pieces;
  std::atomic<int64_t> next{0};  // first piece that nobody has taken
  std::atomic<int> workers{0};   // threads other than the caller inside
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // written once, by whoever sets `failed`

  bool exhausted() const { return next.load(std::memory_order_relaxed) >= pieces; }

  void run_piece(int64_t piece) const { fn(piece * grain, std::min(n, (piece + 1) * grain)); }

  void run() {
    t_inside = true;
    int64_t piece = 0;
    while ((piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces) {
      try {
        run_piece(piece);
      } catch (...) {
        if (!failed.exchange(true)) {
          error = std::current_exception();
        }
        next.store(pieces, std::memory_order_relaxed);
      }
    }
    t_inside = false;
  }
};

// Threads that are started while it lives get no signals: those are the business of the program's
// own threads, and Python wants its main one.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;

 private:
  sigset_t before_;
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}

  // What the child of a fork keeps of its parent's pool.
  int threads_at_fork() const { return threads_; }

  int threads() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return threads_locked();
  }

  void set_threads(int n) {
    const std::lock_guard<std::mutex> lock(mutex_);
    threads_ = n;
    notify_workers();  // those above the new number leave
  }

  void run(Job& job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_workers();
      jobs_.push_back(&job);
      notify_workers();
    }
    job.run();
    {
      // No worker joins from here on; those inside are counted in job.workers.
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    }
    const auto all_left = [&] { return job.workers.load(std::memory_order_acquire) == 0; };
    if (!spin_until(all_left)) {
      std::unique_lock<std::mutex> lock(mutex_);
      job_left_.wait(lock, all_left);
    }
  }

 private:
  int threads_locked() {
    if (threads_ == 0) {
      threads_ = default_num_threads();
    }
    return threads_;
  }

  void notify_workers() {
    epoch_.fetch_add(1, std::memory_order_release);
    if (sleeping_ > 0) {
      job_added_.notify_all();
    }
  }

  void start_workers() {
    const int wanted = threads_locked() - 1;
    if (workers_ >= wanted) {
      return;
    }
    const BlockedSignals blocked;
    try {
      for (; workers_ < wanted; ++workers_) {
        std::thread([this] { work(); }).detach();
      }
    } catch (const std::system_error&) {
      // The limit of processes is reached: the caller and the workers there are do the work.
    }
  }

  Job* find_job() {
    for (Job* job : jobs_) {
      if (!job->exhausted()) {
        return job;
      }
    }
    return nullptr;
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (workers_ < threads_) {
      Job* job = find_job();
      if (job != nullptr) {
        job->workers.fetch_add(1, std::memory_order_relaxed);
        lock.unlock();
        job->run();
        lock.lock();
        // The caller may return, and the job vanish, as soon as this reads 0.
        if (job->workers.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          job_left_.notify_all();
        }
        continue;
      }
      const uint64_t seen = epoch_.load(std::memory_order_acquire);
      lock.unlock();
      const auto called = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
      const bool is_called = spin_until(called);
      lock.lock();
      if (!is_called) {
        ++sleeping_;
        job_added_.wait(lock, called);
        --sleeping_;
      }
    }
    --workers_;
  }

  std::mutex mutex_;
  std::condition_variable job_added_;
  std::condition_variable job_left_;
  std::atomic<uint64_t> epoch_{0};  // written under the mutex, read by spinning workers without
  std::vector<Job*> jobs_;
  int threads_;  // 0 until first asked for
  int workers_ = 0;
  int sleeping_ = 0;
};

// Never destroyed: the workers are detached and may wait in it while the process exits.
alignas(Pool) std::byte g_storage[sizeof(Pool)];

Pool* g_pool = nullptr;

// The child of a fork has none of the workers, and perhaps a mutex that nobody will unlock. The
// old pool is forgotten in place; it owns nothing but the small vector of jobs.
void renew_pool_in_child() { g_pool = new (g_storage) Pool(g_pool->threads_at_fork()); }

Pool& pool() {
  static const bool ready = [] {
    g_pool = new (g_storage) Pool(0);
    pthread_atfork(nullptr, nullptr, renew_pool_in_child);
    return true;
  }();
  static_cast<void>(ready);
  return *g_pool;
}

void check_num_threads(int n) {
  if (n < 1 || n > kMaxThreads) {
    throw std::invalid_argument("the number of threads must be in 1.." +
                                std::to_string(kMaxThreads) + ", got " + std::to_string(n));
  }
}

}  // namespace

int num_threads() { return pool().threads(); }

void set_num_threads(int n) {
  check_num_threads(n);
  pool().set_threads(n);
}

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& fn) {
  if (n < 0 || grain < 1) {
    throw std::invalid_argument("parallel_for wants n >= 0 and grain >= 1, got n=" +
                                std::to_string(n) + ", grain=" + std::to_string(grain));
  }
  const int64_t pieces = n / grain + (n % grain != 0 ? 1 : 0);
  Job job{fn, n, grain, pieces};
  if (t_inside || pieces <= 1 || num_threads() == 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      job.run_piece(piece);
    }
    return;
  }
  pool().run(job);
  if (job.failed.load()) {
    std::rethrow_exception(job.error);
  }
}

}  // namespace qvlfast
