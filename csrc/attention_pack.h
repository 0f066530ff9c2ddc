// Keys and values in the layout of the bfloat16 products of attention.
#pragma once

#include <cstdint>
#include <cstring>

#include "pack.h"

namespace qvlfast {

constexpr int64_t kMostHeadDim = 256;

// `used` keys of `dim` values each, then zeros up to `count`, a multiple of kPanel: in panels of
// kPanel keys, in which two neighbouring values of a key lie together as one 32-bit word, `width`
// values in all.
inline void pack_half_keys(const void* const* keys, int64_t used, int64_t count, int64_t dim,
                           int64_t width, uint32_t* out) {
  const int64_t words = width / 2;
  alignas(64) uint16_t rows[kPanel][kMostHeadDim] = {};
  for (int64_t first = 0; first < count; first += kPanel, out += words * kPanel) {
    for (int64_t c = 0; c < kPanel; ++c) {
      if (first + c < used) {
        std::memcpy(rows[c], keys[first + c], static_cast<size_t>(dim) * 2);
      } else {
        std::memset(rows[c], 0, static_cast<size_t>(dim) * 2);
      }
    }
    for (int64_t w = 0; w < words; ++w) {
      for (int64_t c = 0; c < kPanel; ++c) {
        std::memcpy(out + w * kPanel + c, &rows[c][2 * w], 4);
      }
    }
  }
}

// The values of `used` keys, then zeros up to `count`, which is even: in panels of kPanel of the
// `width` places of a row, in which those of two neighbouring keys lie together as one 32-bit word.
inline void pack_half_values(const void* const* values, int64_t used, int64_t count, int64_t dim,
                             int64_t width, uint32_t* out) {
  alignas(64) uint16_t rows[2][kMostHeadDim] = {};
  for (int64_t j = 0; j < count; j += 2) {
    for (int64_t i = 0; i < 2; ++i) {
      if (j + i < used) {
        std::memcpy(rows[i], values[j + i], static_cast<size_t>(dim) * 2);
      } else {
        std::memset(rows[i], 0, static_cast<size_t>(dim) * 2);
      }
    }
    for (int64_t panel = 0; panel < width / kPanel; ++panel) {
      uint32_t* to = out + (panel * count / 2 + j / 2) * kPanel;
      for (int64_t c = 0; c < kPanel; ++c) {
        to[c] = rows[0][panel * kPanel + c] | static_cast<uint32_t>(rows[1][panel * kPanel + c])
                                                  << 16;
      }
    }
  }
}

}  // namespace qvlfast
