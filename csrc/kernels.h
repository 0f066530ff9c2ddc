// The inner loops, compiled once for each instruction set, and the table that names them.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "pack.h"
#include "tensor.h"

namespace qvlfast {

// What follows the integer or float sums of one block of a product; null pointers are left out.
struct Epilogue {
  const float* x_scale = nullptr;  // [rows], of integer products
  const float* w_scale = nullptr;  // [columns], of integer products
  const float* bias = nullptr;     // [columns]
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  DType residual_dtype = DType::f32;
  enum class Activation { none, gelu_tanh, gelu_erf, silu, swiglu } activation = Activation::none;
  void* out = nullptr;
  int64_t out_stride = 0;
  DType out_dtype = DType::f32;
};

// A block of a product: rows of x that were brought into the form of the kernel, times panels.
struct BlockArgs {
  const void* x = nullptr;  // [rows][k_padded] of `row_bytes`
  int64_t row_bytes = 0;    // from one row to the next
  int64_t rows = 0;
  const PackedWeight* weight = nullptr;
  int64_t panel = 0;
  int64_t panels = 0;
  const int32_t* group_sum = nullptr;  // [rows][groups], Σ of x over each group, of int4
  float* c = nullptr;                  // [rows][panels · 16] sums, float32 or int32
};

// Rows of queries and what has been summed up for each of them.
struct AttentionArgs {
  DType operand = DType::f32;  // float32 or bfloat16: of queries, keys and values
  const void* q = nullptr;     // [rows][q_width], zeros behind in rows up to a multiple of 16
  int64_t q_width = 0;         // head_dim, in bfloat16 with zeros up to `attention_step`
  int64_t rows = 0;
  float scale = 0.0F;            // above zero, by log2(e)
  float* accumulated = nullptr;  // [rows][width]
  int64_t width = 0;             // head_dim in whole panels
  float* most = nullptr;         // [rows]
  float* sum = nullptr;          // [rows]
};

// At most kKeyBlock keys of a sequence and their values, padded with zeros to a multiple of 32:
//   float32   keys [panel][q_width][16], values [count][width]
//   bfloat16  keys [panel][q_width / 2][16][2], values [width / 16][count / 2][16][2]
struct KeyBlock {
  const void* keys = nullptr;
  const void* values = nullptr;
  int64_t count = 0;
};

struct Kernels {
  // Bytes of one value of x as `block` wants it, for a weight of this format.
  int64_t (*x_bytes)(Format format);
  // Brings a row of floats or of int8 into that form, with zeros up to `padded`.
  void (*prepare_row)(const void* row, DType dtype, int64_t k, int64_t padded, Format format,
                      void* out);
  // Rows of a block that keep the registers, or the tiles, full.
  int64_t block_rows;
  // Sums over all of K. Each sum is taken in the same order, whatever the block.
  void (*block)(const BlockArgs& args);
  // Columns [0, count) of sums c [rows][c_stride] to the result.
  void (*finish)(const float* c, int64_t c_stride, int64_t rows, int64_t count, bool integer,
                 const Epilogue& epilogue);
  // int8 values and the scale of a row; see quantise_rows in rowwise.h.
  void (*quantise_row)(const float* x, int64_t n, int8_t* values, float* scale);
  // A row in groups; `x` has room up to a whole group. See quantise_int4 in rowwise.h.
  void (*quantise_int4_row)(float* x, int64_t n, int64_t group, uint8_t* pairs, uint8_t* multiplier,
                            float* scale);
  void (*widen)(const void* x, DType dtype, int64_t n, float* out);
  void (*narrow)(const float* x, int64_t n, DType dtype, void* out);
  void (*rms_norm_row)(const float* x, const float* weight, int64_t n, float eps, float* out);
  void (*layer_norm_row)(const float* x, const float* weight, const float* bias, int64_t n,
                         float eps, float* out);
  void (*rope_head)(const float* x, const float* cos, const float* sin, int64_t half, float* out);
  // What `attend` wants its operands in, for q, k and v of this dtype.
  DType (*attention_dtype)(DType given);
  // In bfloat16 heads are padded with zeros to a multiple of it.
  int64_t attention_step;
  // Row i sees the first `visible[i]` keys of the block.
  void (*attend)(const AttentionArgs& args, const KeyBlock& block, const int64_t* visible);
  // accumulated / sum.
  void (*attend_end)(const AttentionArgs& args);
};

// Keys that share one maximum of the softmax. Blocks begin at multiples of it, counted from the
// beginning of the sequence, so that results do not depend on how it was cut into segments.
constexpr int64_t kKeyBlock = 256;

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();

// Those of an instruction set that this processor has; throws std::invalid_argument otherwise.
const Kernels& kernels(Isa isa);

}  // namespace qvlfast
