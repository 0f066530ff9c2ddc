// What this processor can do at most: multiply-adds from register to register, and reading memory.
// Compiled by benchmarks/limits.py with -march=native for the machine at hand; one call runs on one
// thread for about `seconds`.
#include <immintrin.h>
#include <time.h>

#include <cstdint>
#include <cstring>

namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float F __attribute__((vector_size(4 * kLanes)));

// Runs step() until the time is up; how many operations a second, of `each` a step.
template <class Step>
double rate(double seconds, double each, Step step) {
  const double begun = now();
  double done = 0;
  double spent = 0;
  while (spent < seconds) {
    step();
    done += each;
    spent = now() - begun;
  }
  return done / spent;
}

}  // namespace

extern "C" {

// Floating-point operations a second, two for each multiply-add of float32.
double float_peak(double seconds) {
  const F factor = F{} + 0.999F;
  const F added = F{} + 1e-3F;
  constexpr int kTimes = 20000;
  const double found = rate(seconds, 2.0 * kLanes * 12 * kTimes, [&] {
    F sums[12] = {};
    for (int t = 0; t < kTimes; ++t) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) {
        sums[i] = sums[i] * factor + added;
        __asm__ volatile("" : "+v"(sums[i]));
      }
    }
  });
  return found;
}

// The same for products of bfloat16 with sums in float32; 0 where no vector instruction does them.
double bf16_peak(double seconds) {
#if defined(__AVX512BF16__)
  constexpr int kTimes = 20000;
  const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3F80));
  return rate(seconds, 2.0 * 32 * 12 * kTimes, [&] {
    __m512 sums[12] = {};
    for (int t = 0; t < kTimes; ++t) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) {
        sums[i] = _mm512_dpbf16_ps(sums[i], x, x);
        __asm__ volatile("" : "+v"(sums[i]));
      }
    }
  });
#else
  return 0.0 * seconds;
#endif
}

// The same for the widest exact int8 products of vectors: VNNI or vpmaddwd.
double int8_peak(double seconds) {
  constexpr int kTimes = 20000;
#if defined(__AVX512VNNI__)
  const __m512i x = _mm512_set1_epi8(3);
  return rate(seconds, 2.0 * 64 * 12 * kTimes, [&] {
    __m512i sums[12] = {};
    for (int t = 0; t < kTimes; ++t) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) {
        sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
        __asm__ volatile("" : "+v"(sums[i]));
      }
    }
  });
#else
  return rate(seconds, 2.0 * 16 * 12 * kTimes, [&] {
    __m256i sums[12] = {};
    __m256i x = _mm256_set1_epi16(3);
    for (int t = 0; t < kTimes; ++t) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) {
        __asm__("" : "+v"(x));
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(x, x));
        __asm__ volatile("" : "+v"(sums[i]));
      }
    }
  });
#endif
}

// The same for tiles; 0 where there are none. The process must have asked for them, as qvlfast._C
// does when it is loaded.
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

double amx_peak(double seconds, int int8) {
  static const TileConfig config;
  _tile_loadconfig(&config);
  constexpr int kTimes = 2000;
  const double macs = 16.0 * 16 * (int8 != 0 ? 64 : 32);
  const double found = rate(seconds, 2.0 * macs * 4 * kTimes, [&] {
    for (int t = 0; t < kTimes; ++t) {
      if (int8 != 0) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  });
  _tile_release();
  return found;
}
#else
double amx_peak(double, int) { return 0.0; }
#endif

// Bytes a second of reading `bytes` of memory in order, over and over.
double read_rate(double seconds, const uint8_t* memory, int64_t bytes) {
  F sums[8] = {};
  const double found = rate(seconds, static_cast<double>(bytes), [&] {
    for (int64_t i = 0; i + 8 * 4 * kLanes <= bytes; i += 8 * 4 * kLanes) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        F v;
        std::memcpy(&v, memory + i + j * 4 * kLanes, sizeof v);
        __asm__ volatile("" : : "v"(v));
      }
    }
  });
  return found;
}
}
