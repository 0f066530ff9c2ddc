// Products of rows with a packed weight.
#pragma once

#include <string>

#include "cpu.h"
#include "pack.h"
#include "tensor.h"

namespace qvlfast {

// y = activation(x · Wᵀ + bias) + residual, in float32 between the sum and the result.
//
// x is [M, K] float32 for f32 weights, bfloat16 for bf16 weights, or uint8 (pixels) for both; for
// int8 and int4 weights either of them, rounded to int8 here, or int8 with `x_scale` [M]. Rows may
// be apart. bias is float32 [n], residual and y are [M, n] float32 or bfloat16, [M, n / 2] for the
// activation "swiglu", which takes a gated weight and nothing else does. A null `data` leaves an
// operand out. y may be the residual itself. Sums do not depend on the other rows nor on the
// threads. Throws std::invalid_argument for operands that do not fit.
void gemm(const TensorView& x, const TensorView& x_scale, const PackedWeight& weight,
          const TensorView& bias, const std::string& activation, const TensorView& residual,
          const TensorView& y, Isa isa);

}  // namespace qvlfast
