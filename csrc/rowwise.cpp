#include "rowwise.h"

#include <functional>
#include <stdexcept>
#include <vector>

#include "bf16.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace qvlfast {
namespace {

// A task of about this many values is worth handing over.
constexpr int64_t kTaskValues = 32768;

std::vector<float> widen_vector(const char* name, const TensorView& t, int64_t n) {
  require_dense(name, t, {n}, {DType::f32, DType::bf16});
  std::vector<float> wide(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    wide[static_cast<size_t>(i)] = read_float(t.data, t.dtype, i);
  }
  return wide;
}

// Calls fn(row, x, made) with a row of x as floats and room for as many results.
using RowFunction = std::function<void(int64_t, const float*, float*)>;

void for_each_row(const TensorView& x, const Kernels& k, const RowFunction& fn) {
  const int64_t n = x.shape[1];
  const int64_t grain = std::max<int64_t>(1, kTaskValues / std::max<int64_t>(1, n));
  parallel_for(x.shape[0], grain, [&](int64_t begin, int64_t end) {
    static thread_local Scratch memory;
    auto* wide = static_cast<float*>(memory.get(8 * n));
    for (int64_t i = begin; i < end; ++i) {
      const float* row = wide;
      if (x.dtype == DType::f32) {
        row = static_cast<const float*>(x.row(i));
      } else {
        k.widen(x.row(i), x.dtype, n, wide);
      }
      fn(i, row, wide + n);
    }
  });
}

void require_rows(const TensorView& x, const TensorView& values, const TensorView& scale) {
  require("x", x, {-1, -1}, {DType::f32, DType::bf16});
  require_dense("values", values, {x.shape[0], x.shape[1]}, {DType::s8});
  require_dense("scale", scale, {x.shape[0]}, {DType::f32});
}

void rotate(const TensorView& x, const std::vector<float>* weight, float eps, const TensorView& cos,
            const TensorView& sin, const TensorView& out, const Kernels& k) {
  require("x", x, {-1, -1, -1}, {DType::f32, DType::bf16});
  const int64_t tokens = x.shape[0];
  const int64_t heads = x.shape[1];
  const int64_t dim = x.shape[2];
  if (dim % 2 != 0) {
    throw std::invalid_argument("x is " + x.describe() + "; a head has an even number of values");
  }
  require_dense("cos", cos, {tokens, dim / 2}, {DType::f32});
  require_dense("sin", sin, {tokens, dim / 2}, {DType::f32});
  require_dense("out", out, {tokens, heads, dim}, {x.dtype});
  const int64_t grain = std::max<int64_t>(1, kTaskValues / std::max<int64_t>(1, heads * dim));
  const int64_t size = dtype_size(x.dtype);
  parallel_for(tokens, grain, [&](int64_t begin, int64_t end) {
    static thread_local Scratch memory;
    auto* wide = static_cast<float*>(memory.get(8 * dim));
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        const char* from = static_cast<char*>(x.row(t)) + h * x.stride[1] * size;
        k.widen(from, x.dtype, dim, wide);
        if (weight != nullptr) {
          k.rms_norm_row(wide, weight->data(), dim, eps, wide);
        }
        float* made = wide + dim;
        k.rope_head(wide, cos.as<float>() + t * dim / 2, sin.as<float>() + t * dim / 2, dim / 2,
                    made);
        k.narrow(made, dim, out.dtype, static_cast<char*>(out.data) + (t * heads + h) * dim * size);
      }
    }
  });
}

}  // namespace

void quantise_rows(const TensorView& x, const TensorView& values, const TensorView& scale,
                   Isa isa) {
  const Kernels& k = kernels(isa);
  require_rows(x, values, scale);
  for_each_row(x, k, [&](int64_t i, const float* row, float*) {
    k.quantise_row(row, x.shape[1], static_cast<int8_t*>(values.row(i)), scale.as<float>() + i);
  });
}

void rms_norm(const TensorView& x, const TensorView& weight, float eps, const TensorView& out,
              Isa isa) {
  const Kernels& k = kernels(isa);
  require("x", x, {-1, -1}, {DType::f32, DType::bf16});
  require_dense("out", out, {x.shape[0], x.shape[1]}, {x.dtype});
  const std::vector<float> wide = widen_vector("weight", weight, x.shape[1]);
  for_each_row(x, k, [&](int64_t i, const float* row, float* made) {
    k.rms_norm_row(row, wide.data(), x.shape[1], eps, made);
    k.narrow(made, x.shape[1], out.dtype, out.row(i));
  });
}

void rms_norm_rows(const TensorView& x, const TensorView& weight, float eps,
                   const TensorView& values, const TensorView& scale, Isa isa) {
  const Kernels& k = kernels(isa);
  require_rows(x, values, scale);
  const std::vector<float> wide = widen_vector("weight", weight, x.shape[1]);
  const int64_t n = x.shape[1];
  for_each_row(x, k, [&](int64_t i, const float* row, float* made) {
    k.rms_norm_row(row, wide.data(), n, eps, made);
    if (x.dtype == DType::bf16) {
      static thread_local Scratch memory;
      void* rounded = memory.get(2 * n);
      k.narrow(made, n, DType::bf16, rounded);
      k.widen(rounded, DType::bf16, n, made);
    }
    k.quantise_row(made, n, static_cast<int8_t*>(values.row(i)), scale.as<float>() + i);
  });
}

void layer_norm(const TensorView& x, const TensorView& weight, const TensorView& bias, float eps,
                const TensorView& out, Isa isa) {
  const Kernels& k = kernels(isa);
  require("x", x, {-1, -1}, {DType::f32, DType::bf16});
  require_dense("out", out, {x.shape[0], x.shape[1]}, {x.dtype});
  const std::vector<float> wide = widen_vector("weight", weight, x.shape[1]);
  const std::vector<float> added = widen_vector("bias", bias, x.shape[1]);
  for_each_row(x, k, [&](int64_t i, const float* row, float* made) {
    k.layer_norm_row(row, wide.data(), added.data(), x.shape[1], eps, made);
    k.narrow(made, x.shape[1], out.dtype, out.row(i));
  });
}

void rope(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& out,
          Isa isa) {
  rotate(x, nullptr, 0.0F, cos, sin, out, kernels(isa));
}

void norm_rope(const TensorView& x, const TensorView& weight, const TensorView& cos,
               const TensorView& sin, float eps, const TensorView& out, Isa isa) {
  require("x", x, {-1, -1, -1}, {DType::f32, DType::bf16});
  const std::vector<float> wide = widen_vector("weight", weight, x.shape[2]);
  rotate(x, &wide, eps, cos, sin, out, kernels(isa));
}

}  // namespace qvlfast
