#include "patches.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace qvlfast {
namespace {

// Splits n interleaved RGB pixels into r, g and b.
using Deinterleave = void (*)(const uint8_t* rgb, int64_t n, uint8_t* r, uint8_t* g, uint8_t* b);

void deinterleave_scalar(const uint8_t* rgb, int64_t n, uint8_t* r, uint8_t* g, uint8_t* b) {
  for (int64_t i = 0; i < n; ++i) {
    r[i] = rgb[3 * i];
    g[i] = rgb[3 * i + 1];
    b[i] = rgb[3 * i + 2];
  }
}

#if defined(__x86_64__)

// 48 bytes hold 16 pixels. Every channel has 5 or 6 bytes in each 16-byte part; a shuffle brings
// them to their places and clears the rest (an index of -1), so that three shuffles make a channel.
__attribute__((target("ssse3"))) void deinterleave_ssse3(const uint8_t* rgb, int64_t n, uint8_t* r,
                                                         uint8_t* g, uint8_t* b) {
  const __m128i r0 = _mm_setr_epi8(0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i r1 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14, -1, -1, -1, -1, -1);
  const __m128i r2 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1, 4, 7, 10, 13);
  const __m128i g0 = _mm_setr_epi8(1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i g1 = _mm_setr_epi8(-1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15, -1, -1, -1, -1, -1);
  const __m128i g2 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 2, 5, 8, 11, 14);
  const __m128i b0 = _mm_setr_epi8(2, 5, 8, 11, 14, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i b1 = _mm_setr_epi8(-1, -1, -1, -1, -1, 1, 4, 7, 10, 13, -1, -1, -1, -1, -1, -1);
  const __m128i b2 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 3, 6, 9, 12, 15);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m128i v0 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb + 3 * i));
    const __m128i v1 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb + 3 * i + 16));
    const __m128i v2 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb + 3 * i + 32));
    const __m128i vr = _mm_or_si128(
        _mm_or_si128(_mm_shuffle_epi8(v0, r0), _mm_shuffle_epi8(v1, r1)), _mm_shuffle_epi8(v2, r2));
    const __m128i vg = _mm_or_si128(
        _mm_or_si128(_mm_shuffle_epi8(v0, g0), _mm_shuffle_epi8(v1, g1)), _mm_shuffle_epi8(v2, g2));
    const __m128i vb = _mm_or_si128(
        _mm_or_si128(_mm_shuffle_epi8(v0, b0), _mm_shuffle_epi8(v1, b1)), _mm_shuffle_epi8(v2, b2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(r + i), vr);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(g + i), vg);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(b + i), vb);
  }
  deinterleave_scalar(rgb + 3 * i, n - i, r + i, g + i, b + i);
}

Deinterleave choose_deinterleave() {
  return isa() >= Isa::avx2 ? deinterleave_ssse3 : deinterleave_scalar;
}

#elif defined(__aarch64__)

void deinterleave_neon(const uint8_t* rgb, int64_t n, uint8_t* r, uint8_t* g, uint8_t* b) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const uint8x16x3_t v = vld3q_u8(rgb + 3 * i);
    vst1q_u8(r + i, v.val[0]);
    vst1q_u8(g + i, v.val[1]);
    vst1q_u8(b + i, v.val[2]);
  }
  deinterleave_scalar(rgb + 3 * i, n - i, r + i, g + i, b + i);
}

// NEON is part of the base of aarch64, as SSE2 is of x86-64: `scalar` does not exclude it.
Deinterleave choose_deinterleave() { return deinterleave_neon; }

#else

Deinterleave choose_deinterleave() { return deinterleave_scalar; }

#endif

void require(bool holds, const std::string& message) {
  if (!holds) {
    throw std::invalid_argument(message);
  }
}

}  // namespace

void PatchShape::check() const {
  require(patch >= 1, "patch must be at least 1, got " + std::to_string(patch));
  require(temporal >= 1, "temporal must be at least 1, got " + std::to_string(temporal));
  require(merge >= 1, "merge must be at least 1, got " + std::to_string(merge));
  require(frames >= 1, "frames must hold at least one frame, got T=0");
  require(frames == 1 || frames % temporal == 0,
          "T=" + std::to_string(frames) +
              " must be 1 or a multiple of temporal=" + std::to_string(temporal));
  const std::string multiple =
      " must be a positive multiple of patch*merge=" + std::to_string(patch) + "*" +
      std::to_string(merge);
  // The division comes first: the product of two wild numbers may overflow.
  const auto cuts = [this](int64_t n) { return merge <= n / patch && n % (patch * merge) == 0; };
  require(height >= 1 && cuts(height), "H=" + std::to_string(height) + multiple);
  require(width >= 1 && cuts(width), "W=" + std::to_string(width) + multiple);
}

void extract_patches(const uint8_t* frames, const PatchShape& shape, uint8_t* out) {
  const Deinterleave deinterleave = choose_deinterleave();
  const int64_t patch = shape.patch;
  const int64_t merge = shape.merge;
  const int64_t depth = shape.depth();
  const int64_t block_columns = shape.width / (patch * merge);
  const int64_t block_rows = shape.height / (patch * merge);
  const int64_t blocks = shape.frames / depth * block_rows * block_columns;
  const int64_t row_bytes = shape.row_bytes();
  const int64_t line_bytes = shape.width * 3;
  const int64_t frame_bytes = shape.height * line_bytes;
  const int64_t channel_bytes = depth * patch * patch;

  const auto one_patch = [&](const uint8_t* source, uint8_t* row) {
    for (int64_t frame = 0; frame < depth; ++frame) {
      const uint8_t* line = source + frame * frame_bytes;
      uint8_t* r = row + frame * patch * patch;
      for (int64_t y = 0; y < patch; ++y) {
        deinterleave(line, patch, r, r + channel_bytes, r + 2 * channel_bytes);
        line += line_bytes;
        r += patch;
      }
    }
  };

  const auto one_block = [&](int64_t block) {
    const int64_t column = block % block_columns;
    const int64_t row = block / block_columns % block_rows;
    const int64_t time = block / block_columns / block_rows;
    const uint8_t* corner = frames + time * depth * frame_bytes + row * merge * patch * line_bytes +
                            column * merge * patch * 3;
    uint8_t* rows = out + block * merge * merge * row_bytes;
    for (int64_t i = 0; i < merge; ++i) {
      for (int64_t j = 0; j < merge; ++j) {
        one_patch(corner + i * patch * line_bytes + j * patch * 3, rows);
        rows += row_bytes;
      }
    }
  };

  // Enough to outweigh handing a piece to a thread, little enough to share out one picture.
  constexpr int64_t kBytesPerPiece = 128 << 10;
  const int64_t grain = std::max<int64_t>(1, kBytesPerPiece / (merge * merge * row_bytes));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      one_block(block);
    }
  });
}

}  // namespace qvlfast
