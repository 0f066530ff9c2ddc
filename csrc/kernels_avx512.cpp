// AVX-512 with VNNI, and with BF16 where the processor has it: Cascade Lake, Zen 4 and later.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "bf16.h"
#include "kernels.h"

#if !defined(QVLFAST_EMULATE)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,bmi2")
#endif
#define QVLFAST_LANES 16

namespace qvlfast {
namespace avx512 {

// clang-format off
#include "all.inl"
#include "wide.inl"
#include "attention_bf16.inl"
// clang-format on

// avx512bf16 is in the target of this file; only what asks here first uses it.
bool has_bf16() {
#if defined(QVLFAST_EMULATE)
  return true;
#else
  return cpu_features().avx512_bf16;
#endif
}

int64_t x_bytes(Format format) {
  return format == Format::f32 ? 4 : format == Format::bf16 ? (has_bf16() ? 2 : 4) : 1;
}

void prepare_row(const void* row, DType dtype, int64_t k, int64_t padded, Format format,
                 void* out) {
  const int64_t size = x_bytes(format);
  if (size == 4) {
    widen(row, dtype, k, static_cast<float*>(out));
  } else if (size == 2) {
    copy_halves(row, dtype, k, static_cast<uint16_t*>(out));
  } else if (format == Format::int8) {
    const auto* values = static_cast<const uint8_t*>(row);
    for (int64_t i = 0; i < k; ++i) {
      static_cast<uint8_t*>(out)[i] = values[i] ^ 0x80U;
    }
  } else {
    std::memcpy(out, row, static_cast<size_t>(k));
  }
  std::memset(static_cast<char*>(out) + k * size, 0, static_cast<size_t>((padded - k) * size));
}

void block(const BlockArgs& args) {
  switch (args.weight->format) {
    case Format::f32:
      return float_block<float>(args);
    case Format::bf16:
      return has_bf16() ? dot_bf16_block(args) : float_block<uint16_t>(args);
    case Format::int8:
      return dot_int8_block(args);
    case Format::int4:
      return dot_int4_block(args);
  }
}

struct DotProducts {
  static constexpr int64_t kRows = kRowGroup;
  template <bool kAnew>
  static void multiply(const uint8_t* x, int64_t row_bytes, int64_t rows, const uint8_t* panels,
                       int64_t pitch, int64_t count, int64_t steps, float* c, int64_t c_stride) {
    dot_group<DotBf16, kAnew>(rows, x, row_bytes, panels, pitch, count, steps, Nothing{},
                              reinterpret_cast<int32_t*>(c), c_stride);
  }
};

DType attention_dtype(DType given) {
  return given == DType::bf16 && has_bf16() ? DType::bf16 : DType::f32;
}

void attend(const AttentionArgs& args, const KeyBlock& block, const int64_t* visible) {
  if (args.operand == DType::bf16) {
    attend_with<HalfAttention<DotProducts>>(args, block, visible);
  } else {
    attend_float(args, block, visible);
  }
}

}  // namespace avx512

const Kernels& avx512_kernels() {
  using namespace avx512;
  static const Kernels table{
      x_bytes,           prepare_row, kBlockRows, block,        finish,         quantise_row,
      quantise_int4_row, widen,       narrow,     rms_norm_row, layer_norm_row, rope_head,
      attention_dtype,   2,           attend,     attend_end};
  return table;
}

}  // namespace qvlfast

#undef QVLFAST_LANES
#if !defined(QVLFAST_EMULATE)
#pragma GCC pop_options
#endif
#endif
