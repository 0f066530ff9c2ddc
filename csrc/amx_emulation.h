// The AMX tile instructions in plain C++, for tests on processors without them (QVLFAST_EMULATE).
// Intel SDM volume 2: TDPBF16PS, TDPBSSD, TILELOADD, TILESTORED.
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16.h"

namespace qvlfast {
namespace amx_emulation {

// Tiles of 16 rows of 64 bytes, which is the only shape in use. Unconfigured ones hold NaN.
struct Tile {
  uint8_t rows[16][64];
};

inline Tile* tiles() {
  static thread_local Tile held[8];
  return held;
}

inline void fill(int byte) { std::memset(static_cast<void*>(tiles()), byte, 8 * sizeof(Tile)); }

inline void load(int tile, const void* from, int64_t stride) {
  for (int64_t r = 0; r < 16; ++r) {
    std::memcpy(tiles()[tile].rows[r], static_cast<const char*>(from) + r * stride, 64);
  }
}

inline void store(int tile, void* to, int64_t stride) {
  for (int64_t r = 0; r < 16; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tiles()[tile].rows[r], 64);
  }
}

template <class T>
T value(int tile, int row, int i) {
  T found;
  std::memcpy(&found, tiles()[tile].rows[row] + i * sizeof(T), sizeof(T));
  return found;
}

template <class Sum, class T, class Widen>
void multiply(int sum, int a, int b, Widen widen) {
  constexpr int kPack = 4 / sizeof(T);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      Sum total = value<Sum>(sum, m, n);
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < kPack; ++i) {
          total += widen(value<T>(a, m, kPack * k + i)) * widen(value<T>(b, k, kPack * n + i));
        }
      }
      std::memcpy(tiles()[sum].rows[m] + 4 * n, &total, 4);
    }
  }
}

}  // namespace amx_emulation
}  // namespace qvlfast

#define _tile_loadconfig(config) qvlfast::amx_emulation::fill(0)
#define _tile_release() qvlfast::amx_emulation::fill(0xFF)
#define _tile_loadd(tile, from, stride) qvlfast::amx_emulation::load(tile, from, stride)
#define _tile_stored(tile, to, stride) qvlfast::amx_emulation::store(tile, to, stride)
#define _tile_dpbf16ps(sum, a, b) \
  qvlfast::amx_emulation::multiply<float, uint16_t>(sum, a, b, qvlfast::from_bf16)
#define _tile_dpbssd(sum, a, b)                      \
  qvlfast::amx_emulation::multiply<int32_t, int8_t>( \
      sum, a, b, [](int8_t v) { return static_cast<int32_t>(v); })
