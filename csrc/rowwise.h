// Norms, rotary embeddings and the rounding of rows. Everything is computed in float32.
#pragma once

#include "cpu.h"
#include "tensor.h"

namespace qvlfast {

// All throw std::invalid_argument for operands that do not fit. x may have rows apart, outputs are
// dense. Floats are float32 or bfloat16, of x and out alike; weights and biases are float32 or
// bfloat16.

// values int8 [M, K], scale float32 [M]: scale = max(|x|, 1e-30) / 127, halves to the even
// neighbour; a row with NaN or infinity in it becomes zeros with a scale of NaN.
void quantise_rows(const TensorView& x, const TensorView& values, const TensorView& scale, Isa isa);

// The same for a weight [N, K] in two levels, values · multiplier of a group · scale: pairs uint8
// [N, K / 2], each two values + 8 of -7..7 with the first in the low half, multiplier uint8
// [N, ceil(K / group)] of 1..18, scale float32 [N] = max(|x|, 1e-30) / 126, rounded up to 16 bits.
// float16 is taken as well.
void quantise_int4(const TensorView& x, int64_t group, const TensorView& pairs,
                   const TensorView& multiplier, const TensorView& scale, Isa isa);

// x / sqrt(mean(x²) + eps) · weight; x, out [M, C].
void rms_norm(const TensorView& x, const TensorView& weight, float eps, const TensorView& out,
              Isa isa);
// The same, rounded to the dtype of x and then as `quantise_rows` does.
void rms_norm_rows(const TensorView& x, const TensorView& weight, float eps,
                   const TensorView& values, const TensorView& scale, Isa isa);

// The same of the rows `read` int64 [R], or of all where it is null, in float32: out [R, C]; or
// with fewer columns the first of them, scaled to unit length if `unit`.
void pool(const TensorView& x, const TensorView& read, const TensorView& weight, float eps,
          bool unit, const TensorView& out, Isa isa);
// sigmoid(pooled · (yes - no)); answers float32 [2, C] are yes and no, out float32 [R].
void score(const TensorView& x, const TensorView& read, const TensorView& weight, float eps,
           const TensorView& answers, const TensorView& out, Isa isa);

// (x - mean) / sqrt(variance + eps) · weight + bias; x, out [M, C].
void layer_norm(const TensorView& x, const TensorView& weight, const TensorView& bias, float eps,
                const TensorView& out, Isa isa);

// Each head's halves are rotated; x, out [T, H, D], whose tokens and heads may be apart, cos and
// sin float32 [T, D / 2]. With `weight` [D], RMSNorm of each head comes first. `out` may be `x`.
void rope(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& out,
          Isa isa);
void norm_rope(const TensorView& x, const TensorView& weight, const TensorView& cos,
               const TensorView& sin, float eps, const TensorView& out, Isa isa);

}  // namespace qvlfast
