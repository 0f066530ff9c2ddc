// For any processor: vectors of 4, which SSE2 and NEON have.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bf16.h"
#include "kernels.h"

#define QVLFAST_LANES 4

namespace qvlfast {
namespace portable {

#include "all.inl"

int64_t x_bytes(Format format) { return format == Format::f32 || format == Format::bf16 ? 4 : 1; }

void prepare_row(const void* row, DType dtype, int64_t k, int64_t padded, Format, void* out) {
  const int64_t size = dtype == DType::s8 ? 1 : 4;
  if (dtype == DType::s8) {
    std::memcpy(out, row, static_cast<size_t>(k));
  } else {
    widen(row, dtype, k, static_cast<float*>(out));
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
      return plain_int8_block(args);
    case Format::int4:
      return plain_int4_block(args);
  }
}

}  // namespace portable

const Kernels& portable_kernels() {
  using namespace portable;
  static const Kernels table{
      x_bytes,           prepare_row, kBlockRows,   block,        finish,         quantise_row,
      quantise_int4_row, widen,       narrow,       rms_norm_row, layer_norm_row, rope_head,
      float_attention,   1,           attend_float, attend_end};
  return table;
}

}  // namespace qvlfast
