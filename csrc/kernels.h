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

struct AttentionArgs {
  const float* q = nullptr;  // [rows][head_dim], scaled by log2(e)
  int64_t rows = 0;
  int64_t head_dim = 0;
  float* accumulated = nullptr;  // [rows][head_dim]
  float* most = nullptr;         // [rows]
  float* sum = nullptr;          // [rows]
};

// A run of keys that lie one after the other in memory, at absolute places in a sequence.
struct KeyPiece {
  const float* keys = nullptr;    // panels [head_dim][16]; the first one holds key 0 of the piece
  const float* values = nullptr;  // [count][head_dim]
  int64_t skip = 0;               // columns of the first panel before the piece
  int64_t count = 0;
};

struct Kernels {
  // Bytes of one value of x as `block` wants it, for a weight of this format.
  int64_t (*x_bytes)(Format format);
  // Brings a row of floats or of int8 into that form, with zeros up to `padded`.
  void (*prepare_row)(const void* row, DType dtype, int64_t k, int64_t padded, Format format,
                      void* out);
  // Sums over all of K. Each sum is taken in the same order, whatever the block.
  void (*block)(const BlockArgs& args);
  // Columns [0, count) of sums c [rows][c_stride] to the result.
  void (*finish)(const float* c, int64_t c_stride, int64_t rows, int64_t count, bool integer,
                 const Epilogue& epilogue);
  // int8 values and the scale of a row; see quantise_rows in rowwise.h.
  void (*quantise_row)(const float* x, int64_t n, int8_t* values, float* scale);
  void (*widen)(const void* x, DType dtype, int64_t n, float* out);
  void (*narrow)(const float* x, int64_t n, DType dtype, void* out);
  void (*rms_norm_row)(const float* x, const float* weight, int64_t n, float eps, float* out);
  void (*layer_norm_row)(const float* x, const float* weight, const float* bias, int64_t n,
                         float eps, float* out);
  void (*rope_head)(const float* x, const float* cos, const float* sin, int64_t half, float* out);
  // One block of at most kKeyBlock keys, in pieces; row i sees the first `visible[i]` of them.
  void (*attend)(const AttentionArgs& args, const KeyPiece* pieces, int64_t piece_count,
                 const int64_t* visible);
  // accumulated / sum.
  void (*attend_end)(const AttentionArgs& args);
  // Rows of a block are worked on together in groups of so many.
  int64_t row_group;
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
