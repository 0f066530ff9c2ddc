// AVX2 with FMA and F16C: Haswell, Zen and later.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bf16.h"
#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define QVLFAST_LANES 8

namespace qvlfast {
namespace avx2 {

#include "all.inl"

// int8: vpmaddwd multiplies pairs of int16 and adds them in int32, all exact. A part of a panel is
// widened to [K / 2][16][2] int16, which stays in L1 while all rows go by it.
constexpr int64_t kWideInner = 512;

inline __m256i load_256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline __m256i splat_pair(const int16_t* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return _mm256_set1_epi32(pair);
}

// Widens `k` steps of a panel.
inline void widen_panel(const uint8_t* w, int64_t k, int16_t* out) {
  for (int64_t i = 0; i < k; i += 4, w += 64, out += 64) {
    __builtin_prefetch(w + kAhead);
    for (int half = 0; half < 2; ++half) {
      const auto* from = reinterpret_cast<const __m128i*>(w + 32 * half);
      // Four channels with four steps each; then the first two and the last two steps of eight.
      const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128(from));
      const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1));
      const __m256 af = _mm256_castsi256_ps(a);
      const __m256 bf = _mm256_castsi256_ps(b);
      const __m256i early = _mm256_castps_si256(_mm256_shuffle_ps(af, bf, 0x88));
      const __m256i late = _mm256_castps_si256(_mm256_shuffle_ps(af, bf, 0xDD));
      store_256(out + 16 * half, _mm256_permute4x64_epi64(early, 0xD8));
      store_256(out + 32 + 16 * half, _mm256_permute4x64_epi64(late, 0xD8));
    }
  }
}

template <int R>
__attribute__((noinline)) void wide_tile(const int16_t* x, int64_t x_stride, const int16_t* w,
                                         int64_t k, int32_t* c, int64_t c_stride) {
  __m256i sums[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    sums[r][0] = load_256(c + r * c_stride);
    sums[r][1] = load_256(c + r * c_stride + 8);
  }
  for (int64_t i = 0; i < k; i += 2, w += 32) {
    const __m256i first = load_256(w);
    const __m256i second = load_256(w + 16);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256i value = splat_pair(x + r * x_stride + i);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(value, first));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(value, second));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    store_256(c + r * c_stride, sums[r][0]);
    store_256(c + r * c_stride + 8, sums[r][1]);
  }
}

// Two rows at most: the weights go straight from memory to the registers. A sum has two halves.
template <int R>
inline void stream_tile(const int16_t* x, int64_t x_stride, const uint8_t* w, int64_t k, int32_t* c,
                        int64_t c_stride) {
  __m256i sums[R][4] = {};
  for (int64_t i = 0; i < k; i += 4, w += 64) {
    __builtin_prefetch(w + kAhead);
    __m256i values[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      int64_t four;
      std::memcpy(&four, x + r * x_stride + i, sizeof four);
      values[r] = _mm256_set1_epi64x(four);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i weights =
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w) + v));
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(values[r], weights));
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 4; v += 2) {
      const __m256i added = _mm256_hadd_epi32(sums[r][v], sums[r][v + 1]);
      store_256(c + r * c_stride + 4 * v, _mm256_permute4x64_epi64(added, 0xD8));
    }
  }
}

inline void int8_block(const BlockArgs& a) {
  const int64_t columns = a.panels * kPanel;
  const int64_t stride = a.row_bytes / 2;
  const int64_t k_end = a.weight->k_padded;
  const auto* x = static_cast<const int16_t*>(a.x);
  auto* c = reinterpret_cast<int32_t*>(a.c);
  if (a.rows <= 2) {
    for (int64_t p = 0; p < a.panels; ++p) {
      const auto tile = a.rows == 2 ? stream_tile<2> : stream_tile<1>;
      tile(x, stride, a.weight->panel(a.panel + p), k_end, c + p * kPanel, columns);
    }
    return;
  }
  std::memset(c, 0, static_cast<size_t>(a.rows * columns) * 4);
  alignas(64) int16_t wide[kWideInner * kPanel];
  for (int64_t k = 0; k < k_end; k += kWideInner) {
    const int64_t length = std::min(kWideInner, k_end - k);
    for (int64_t p = 0; p < a.panels; ++p) {
      widen_panel(a.weight->panel(a.panel + p) + k * kPanel, length, wide);
      for (int64_t r = 0; r < a.rows; r += 6) {
        const int16_t* from = x + r * stride + k;
        int32_t* to = c + r * columns + p * kPanel;
        switch (std::min<int64_t>(6, a.rows - r)) {
          case 6:
            wide_tile<6>(from, stride, wide, length, to, columns);
            break;
          case 5:
            wide_tile<5>(from, stride, wide, length, to, columns);
            break;
          case 4:
            wide_tile<4>(from, stride, wide, length, to, columns);
            break;
          case 3:
            wide_tile<3>(from, stride, wide, length, to, columns);
            break;
          case 2:
            wide_tile<2>(from, stride, wide, length, to, columns);
            break;
          default:
            wide_tile<1>(from, stride, wide, length, to, columns);
        }
      }
    }
  }
}

// int4: vpmaddubsw multiplies weights 0..15 by x, and pairs of products, at most 2 · 15 · 127, add
// up in int16 eight times over before they could overflow: 32 inputs, which is the smallest group.
// The multiplier of the group then comes with the widening to int32, in vpmaddwd. That weights are
// stored with 8 added is taken back through the sums of x over each group.
template <int R>
__attribute__((noinline)) void int4_tile(const int8_t* x, int64_t x_stride, const uint8_t* w,
                                         const uint8_t* factors, const int32_t* group_sum,
                                         int64_t groups, int64_t group, int32_t* c,
                                         int64_t c_stride) {
  const __m256i low = _mm256_set1_epi8(15);
  alignas(64) int32_t totals[R][16];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    __m256i first = _mm256_setzero_si256();
    __m256i second = first;
    for (int64_t g = 0; g < groups; ++g) {
      const __m128i narrow =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(factors + g * kPanel));
      const __m256i sum = _mm256_set1_epi32(-8 * group_sum[r * groups + g]);
      first = _mm256_add_epi32(first, _mm256_mullo_epi32(sum, _mm256_cvtepu8_epi32(narrow)));
      second = _mm256_add_epi32(
          second, _mm256_mullo_epi32(sum, _mm256_cvtepu8_epi32(_mm_srli_si128(narrow, 8))));
    }
    store_256(totals[r], first);
    store_256(totals[r] + 8, second);
  }
  int64_t k = 0;
  for (int64_t g = 0; g < groups; ++g, factors += kPanel) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(factors));
    const __m256i f0 = _mm256_cvtepu8_epi32(narrow);
    const __m256i f1 = _mm256_cvtepu8_epi32(_mm_srli_si128(narrow, 8));
    const __m256i factor0 = _mm256_or_si256(f0, _mm256_slli_epi32(f0, 16));
    const __m256i factor1 = _mm256_or_si256(f1, _mm256_slli_epi32(f1, 16));
    for (int64_t end = k + group; k < end;) {
      __m256i sums[R][2] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, w += 64, k += 8) {
        __builtin_prefetch(w + kAhead);
        const __m256i a = load_256(w);
        const __m256i b = load_256(w + 32);
        const __m256i w0 = _mm256_and_si256(a, low);
        const __m256i w1 = _mm256_and_si256(b, low);
        const __m256i w2 = _mm256_and_si256(_mm256_srli_epi16(a, 4), low);
        const __m256i w3 = _mm256_and_si256(_mm256_srli_epi16(b, 4), low);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const auto* at = reinterpret_cast<const int16_t*>(x + r * x_stride + k);
          const __m256i x0 = splat_pair(at);
          sums[r][0] = _mm256_add_epi16(sums[r][0], _mm256_maddubs_epi16(w0, x0));
          sums[r][1] = _mm256_add_epi16(sums[r][1], _mm256_maddubs_epi16(w1, x0));
          const __m256i x1 = splat_pair(at + 2);
          sums[r][0] = _mm256_add_epi16(sums[r][0], _mm256_maddubs_epi16(w2, x1));
          sums[r][1] = _mm256_add_epi16(sums[r][1], _mm256_maddubs_epi16(w3, x1));
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        store_256(totals[r],
                  _mm256_add_epi32(load_256(totals[r]), _mm256_madd_epi16(sums[r][0], factor0)));
        store_256(totals[r] + 8, _mm256_add_epi32(load_256(totals[r] + 8),
                                                  _mm256_madd_epi16(sums[r][1], factor1)));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    std::memcpy(c + r * c_stride, totals[r], sizeof totals[r]);
  }
}

inline void int4_block(const BlockArgs& a) {
  const int64_t columns = a.panels * kPanel;
  const PackedWeight& weight = *a.weight;
  const int64_t groups = weight.groups();
  const auto* x = static_cast<const int8_t*>(a.x);
  auto* c = reinterpret_cast<int32_t*>(a.c);
  for (int64_t p = 0; p < a.panels; ++p) {
    const uint8_t* w = weight.panel(a.panel + p);
    const uint8_t* factors = weight.multiplier.data() + (a.panel + p) * groups * kPanel;
    for (int64_t r = 0; r < a.rows; r += 4) {
      const int8_t* from = x + r * a.row_bytes;
      const int32_t* sum = a.group_sum + r * groups;
      int32_t* to = c + r * columns + p * kPanel;
      switch (std::min<int64_t>(4, a.rows - r)) {
        case 4:
          int4_tile<4>(from, a.row_bytes, w, factors, sum, groups, weight.group, to, columns);
          break;
        case 3:
          int4_tile<3>(from, a.row_bytes, w, factors, sum, groups, weight.group, to, columns);
          break;
        case 2:
          int4_tile<2>(from, a.row_bytes, w, factors, sum, groups, weight.group, to, columns);
          break;
        default:
          int4_tile<1>(from, a.row_bytes, w, factors, sum, groups, weight.group, to, columns);
      }
    }
  }
}

int64_t x_bytes(Format format) {
  return format == Format::int4 ? 1 : format == Format::int8 ? 2 : 4;
}

void prepare_row(const void* row, DType dtype, int64_t k, int64_t padded, Format format,
                 void* out) {
  const int64_t size = x_bytes(format);
  if (dtype != DType::s8) {
    widen(row, dtype, k, static_cast<float*>(out));
  } else if (format == Format::int4) {
    std::memcpy(out, row, static_cast<size_t>(k));
  } else {
    const auto* values = static_cast<const int8_t*>(row);
    std::copy(values, values + k, static_cast<int16_t*>(out));
  }
  std::memset(static_cast<char*>(out) + k * size, 0, static_cast<size_t>((padded - k) * size));
}

void block(const BlockArgs& args) {
  switch (args.weight->format) {
    case Format::f32:
      return float_block<float>(args);
    case Format::bf16:
      return float_block<uint16_t>(args);
    case Format::int8:
      return int8_block(args);
    case Format::int4:
      return int4_block(args);
  }
}

}  // namespace avx2

const Kernels& avx2_kernels() {
  using namespace avx2;
  static const Kernels table{
      x_bytes,           prepare_row, kBlockRows,   block,        finish,         quantise_row,
      quantise_int4_row, widen,       narrow,       rms_norm_row, layer_norm_row, rope_head,
      float_attention,   1,           attend_float, attend_end};
  return table;
}

}  // namespace qvlfast

#undef QVLFAST_LANES
#pragma GCC pop_options
#endif
