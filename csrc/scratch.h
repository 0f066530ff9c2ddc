// Memory for kernels: aligned to cache lines, and in large pages where it is large.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qvlfast {

// To be given back with std::free; throws std::bad_alloc. In pages of 4 KB, reading weights from
// memory takes a fifth longer: the processor walks page tables all the time.
inline void* allocate_lines(int64_t bytes) {
  constexpr int64_t kLine = 64;
  constexpr int64_t kLargePage = 2 << 20;
  const int64_t align = bytes >= kLargePage ? kLargePage : kLine;
  const int64_t rounded = (bytes + kLine - 1) / kLine * kLine;
  void* memory = nullptr;
  if (posix_memalign(&memory, static_cast<size_t>(align), static_cast<size_t>(rounded)) != 0) {
    throw std::bad_alloc();
  }
#if defined(MADV_HUGEPAGE)
  if (align == kLargePage) {
    // A wish; what is left over at the end stays in small pages.
    static_cast<void>(madvise(memory, static_cast<size_t>(rounded), MADV_HUGEPAGE));
  }
#endif
  return memory;
}

// Memory that a thread keeps between calls.
class Scratch {
 public:
  // Grows to the largest size asked for; what it held is lost then.
  void* get(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_.reset(allocate_lines(rounded));
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace qvlfast
