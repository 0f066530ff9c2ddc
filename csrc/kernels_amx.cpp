// AMX tiles for bf16, int8 and int4 weights; the rest as with AVX-512.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bf16.h"
#include "kernels.h"

#if defined(QVLFAST_EMULATE)
#include "amx_emulation.h"
#else
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-int8,amx-bf16")
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,bmi2")
#endif

#define QVLFAST_LANES 16

namespace qvlfast {
namespace amx {

// clang-format off
#include "all.inl"
#include "attention_bf16.inl"
// clang-format on

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;         // of a row
constexpr int64_t kPanelBytes = 16 << 10;  // of two panels at a time, which then stay in L1
constexpr int64_t kTile = kTileRows * kTileBytes;

// Intel SDM volume 1, section 18.2: palette 1, and rows and bytes of each of the 8 tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configured for one block and released after it: a thread that holds tiles costs every context
// switch 8 KB.
class Tiles {
 public:
  Tiles() {
    static const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// c [32][32] += x [32][steps · 64 bytes] · two panels. Tiles 0-3 are the sums, 4 and 5 rows, 6 and
// 7 panels: each load serves two products.
template <bool kBf16>
inline void tile_32x32(const uint8_t* x, int64_t row_bytes, const uint8_t* w0, const uint8_t* w1,
                       int64_t steps, float* c, int64_t c_stride) {
  const int64_t c_bytes = c_stride * 4;
  float* lower = c + kTileRows * c_stride;
  _tile_loadd(0, c, c_bytes);
  _tile_loadd(1, c + 16, c_bytes);
  _tile_loadd(2, lower, c_bytes);
  _tile_loadd(3, lower + 16, c_bytes);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, x + i * kTileBytes, row_bytes);
    _tile_loadd(6, w0 + i * kTile, kTileBytes);
    _tile_loadd(7, w1 + i * kTile, kTileBytes);
    _tile_loadd(5, x + kTileRows * row_bytes + i * kTileBytes, row_bytes);
    if constexpr (kBf16) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, lower, c_bytes);
  _tile_stored(3, lower + 16, c_bytes);
}

// The same for 16 rows, or for one panel.
template <bool kBf16>
inline void tile_16x16(const uint8_t* x, int64_t row_bytes, const uint8_t* w, int64_t steps,
                       float* c, int64_t c_stride) {
  _tile_loadd(0, c, c_stride * 4);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, x + i * kTileBytes, row_bytes);
    _tile_loadd(6, w + i * kTile, kTileBytes);
    if constexpr (kBf16) {
      _tile_dpbf16ps(0, 4, 6);
    } else {
      _tile_dpbssd(0, 4, 6);
    }
  }
  _tile_stored(0, c, c_stride * 4);
}

template <bool kBf16>
inline void tile_panels(int64_t rows, const uint8_t* x, int64_t row_bytes, const uint8_t* w0,
                        const uint8_t* w1, int64_t steps, float* c, int64_t c_stride) {
  for (int64_t r = 0; r < rows; r += 2 * kTileRows) {
    const uint8_t* from = x + r * row_bytes;
    float* to = c + r * c_stride;
    if (w1 != nullptr && rows - r > kTileRows) {
      tile_32x32<kBf16>(from, row_bytes, w0, w1, steps, to, c_stride);
      continue;
    }
    for (int64_t s = 0; s < 2 * kTileRows && r + s < rows; s += kTileRows) {
      tile_16x16<kBf16>(from + s * row_bytes, row_bytes, w0, steps, to + s * c_stride, c_stride);
      if (w1 != nullptr) {
        tile_16x16<kBf16>(from + s * row_bytes, row_bytes, w1, steps, to + s * c_stride + 16,
                          c_stride);
      }
    }
  }
}

// int4 weights of `count` inputs from input k on as int8: value times multiplier, 127 at most.
inline void widen_int4(const PackedWeight& weight, int64_t panel, int64_t k, int64_t count,
                       int8_t* out) {
  const uint8_t* w = weight.panel(panel) + k * kPanel / 2;
  for (int64_t end = k + count; k < end; k += 8, w += 64, out += 128) {
    const uint8_t* factors =
        weight.multiplier.data() + (panel * weight.groups() + k / weight.group) * kPanel;
    int8_t spread[64];
    for (int64_t i = 0; i < 64; ++i) {
      spread[i] = static_cast<int8_t>(factors[i / 4]);
    }
    for (int64_t i = 0; i < 64; ++i) {
      out[i] = static_cast<int8_t>(((w[i] & 15) - 8) * spread[i]);
      out[64 + i] = static_cast<int8_t>(((w[i] >> 4) - 8) * spread[i]);
    }
  }
}

template <bool kBf16>
inline void tile_block(const BlockArgs& a) {
  const int64_t columns = a.panels * kPanel;
  const PackedWeight& weight = *a.weight;
  const bool int4 = weight.format == Format::int4;
  const int64_t bytes = weight.k_padded * (kBf16 ? 2 : 1) * kPanel;  // of a panel, once widened
  const int64_t rows = (a.rows + kTileRows - 1) / kTileRows * kTileRows;
  // Few rows: all of K at once reads each panel from its beginning to its end.
  const int64_t inner = rows > 2 * kTileRows || int4 ? kPanelBytes : bytes;
  std::memset(a.c, 0, static_cast<size_t>(rows * columns) * 4);
  alignas(64) int8_t wide[2][kPanelBytes];
  const Tiles configured;
  for (int64_t at = 0; at < bytes; at += inner) {
    const int64_t length = std::min(inner, bytes - at);
    const auto* x = static_cast<const uint8_t*>(a.x) + at / kTileRows;
    for (int64_t p = 0; p < a.panels; p += 2) {
      const bool two = p + 1 < a.panels;
      const uint8_t* w[2] = {nullptr, nullptr};
      for (int i = 0; i < (two ? 2 : 1); ++i) {
        if (int4) {
          widen_int4(weight, a.panel + p + i, at / kPanel, length / kPanel, wide[i]);
          w[i] = reinterpret_cast<const uint8_t*>(wide[i]);
        } else {
          w[i] = weight.panel(a.panel + p + i) + at;
        }
      }
      tile_panels<kBf16>(rows, x, a.row_bytes, w[0], w[1], length / kTile, a.c + p * kPanel,
                         columns);
    }
  }
}

int64_t x_bytes(Format format) {
  return format == Format::f32 ? 4 : format == Format::bf16 ? 2 : 1;
}

void prepare_row(const void* row, DType dtype, int64_t k, int64_t padded, Format format,
                 void* out) {
  if (format == Format::f32) {
    avx512_kernels().prepare_row(row, dtype, k, padded, format, out);
    return;
  }
  const int64_t size = x_bytes(format);
  if (format == Format::bf16) {
    copy_halves(row, dtype, k, static_cast<uint16_t*>(out));
  } else {
    std::memcpy(out, row, static_cast<size_t>(k));
  }
  std::memset(static_cast<char*>(out) + k * size, 0, static_cast<size_t>((padded - k) * size));
}

void block(const BlockArgs& args) {
  switch (args.weight->format) {
    case Format::f32:
      return avx512_kernels().block(args);
    case Format::bf16:
      return tile_block<true>(args);
    case Format::int8:
    case Format::int4:
      return tile_block<false>(args);
  }
}

struct TileProducts {
  static constexpr int64_t kRows = 2 * kTileRows;
  template <bool kAnew>
  static void multiply(const uint8_t* x, int64_t row_bytes, int64_t rows, const uint8_t* panels,
                       int64_t pitch, int64_t count, int64_t steps, float* c, int64_t c_stride) {
    for (int64_t r = 0; kAnew && r < rows; ++r) {
      std::memset(c + r * c_stride, 0, static_cast<size_t>(count * kPanel) * 4);
    }
    for (int64_t p = 0; p < count; p += 2) {
      const uint8_t* w = panels + p * pitch;
      tile_panels<true>(rows, x, row_bytes, w, p + 1 < count ? w + pitch : nullptr,
                        steps / kTileRows, c + p * kPanel, c_stride);
    }
  }
};

DType attention_dtype(DType given) { return given == DType::bf16 ? DType::bf16 : DType::f32; }

void attend(const AttentionArgs& args, const KeyBlock& block, const int64_t* visible) {
  if (args.operand == DType::bf16) {
    const Tiles configured;
    attend_with<HalfAttention<TileProducts>>(args, block, visible);
  } else {
    avx512_kernels().attend(args, block, visible);
  }
}

}  // namespace amx

const Kernels& amx_kernels() {
  static const Kernels table = [] {
    Kernels made = avx512_kernels();
    made.x_bytes = amx::x_bytes;
    made.prepare_row = amx::prepare_row;
    made.block_rows = 4 * amx::kTileRows;  // tile_32x32 twice
    made.block = amx::block;
    made.attention_dtype = amx::attention_dtype;
    made.attention_step = 2 * amx::kTileRows;
    made.attend = amx::attend;
    return made;
  }();
  return table;
}

}  // namespace qvlfast

#undef QVLFAST_LANES
#if !defined(QVLFAST_EMULATE)
#pragma GCC pop_options
#endif
#endif
