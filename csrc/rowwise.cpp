#include "rowwise.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
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

// The rows of x that are read, all of them where `read` is null.
std::vector<int64_t> rows_read(const TensorView& x, const TensorView& read) {
  require("x", x, {-1, -1}, {DType::f32, DType::bf16});
  std::vector<int64_t> rows;
  if (read.data == nullptr) {
    for (int64_t i = 0; i < x.shape[0]; ++i) {
      rows.push_back(i);
    }
    return rows;
  }
  require_dense("read", read, {-1}, {DType::i64});
  for (int64_t i = 0; i < read.shape[0]; ++i) {
    const int64_t row = read.as<const int64_t>()[i];
    if (row < 0 || row >= x.shape[0]) {
      throw std::invalid_argument("read has row " + std::to_string(row) + ", x has " +
                                  std::to_string(x.shape[0]));
    }
    rows.push_back(row);
  }
  return rows;
}

// Calls fn(i, pooled) for the i-th row that is read.
template <class Use>
void for_each_pooled(const TensorView& x, const TensorView& read, const TensorView& weight,
                     float eps, const Kernels& k, const Use& use) {
  const std::vector<int64_t> rows = rows_read(x, read);
  const int64_t n = x.shape[1];
  const std::vector<float> wide = widen_vector("weight", weight, n);
  parallel_for(static_cast<int64_t>(rows.size()), 16, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(n));
    for (int64_t i = begin; i < end; ++i) {
      k.widen(x.row(rows[static_cast<size_t>(i)]), x.dtype, n, row.data());
      k.rms_norm_row(row.data(), wide.data(), n, eps, row.data());
      use(i, row.data());
    }
  });
}

int64_t count_read(const TensorView& x, const TensorView& read) {
  return read.data == nullptr ? x.shape[0] : read.shape[0];
}

void require_rows(const TensorView& x, const TensorView& values, const TensorView& scale) {
  require("x", x, {-1, -1}, {DType::f32, DType::bf16, DType::f16});
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
  require_distinct("out", out, {tokens, heads, dim}, {x.dtype});
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
        k.narrow(made, dim, out.dtype, static_cast<char*>(out.row(t)) + h * out.stride[1] * size);
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

void quantise_int4(const TensorView& x, int64_t group, const TensorView& pairs,
                   const TensorView& multiplier, const TensorView& scale, Isa isa) {
  const Kernels& k = kernels(isa);
  require("x", x, {-1, -1}, {DType::f32, DType::bf16, DType::f16});
  const int64_t n = x.shape[1];
  if ((group != 32 && group != 64 && group != 128) || n % 2 != 0) {
    throw std::invalid_argument("x is " + x.describe() + " and group " + std::to_string(group) +
                                "; expected an even number of inputs, and 32, 64 or 128");
  }
  const int64_t groups = (n + group - 1) / group;
  require_dense("pairs", pairs, {x.shape[0], n / 2}, {DType::u8});
  require_dense("multiplier", multiplier, {x.shape[0], groups}, {DType::u8});
  require_dense("scale", scale, {x.shape[0]}, {DType::f32});
  parallel_for(x.shape[0], 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(groups * group));
    for (int64_t i = begin; i < end; ++i) {
      k.widen(x.row(i), x.dtype, n, row.data());
      k.quantise_int4_row(row.data(), n, group, static_cast<uint8_t*>(pairs.row(i)),
                          static_cast<uint8_t*>(multiplier.row(i)), scale.as<float>() + i);
    }
  });
}

void pool(const TensorView& x, const TensorView& read, const TensorView& weight, float eps,
          bool unit, const TensorView& out, Isa isa) {
  require_dense("out", out, {count_read(x, read), -1}, {DType::f32});
  const int64_t size = out.shape[1];
  if (size > x.shape[1]) {
    throw std::invalid_argument("out is " + out.describe() + ", wider than x, " + x.describe());
  }
  for_each_pooled(x, read, weight, eps, kernels(isa), [&](int64_t i, const float* pooled) {
    float squares = 0.0F;
    for (int64_t j = 0; unit && j < size; ++j) {
      squares += pooled[j] * pooled[j];
    }
    const float factor = unit ? 1.0F / std::max(std::sqrt(squares), 1e-12F) : 1.0F;
    auto* to = static_cast<float*>(out.row(i));
    for (int64_t j = 0; j < size; ++j) {
      to[j] = pooled[j] * factor;
    }
  });
}

void score(const TensorView& x, const TensorView& read, const TensorView& weight, float eps,
           const TensorView& answers, const TensorView& out, Isa isa) {
  require_dense("out", out, {count_read(x, read)}, {DType::f32});
  require_dense("answers", answers, {2, x.shape[1]}, {DType::f32});
  const auto* yes = answers.as<const float>();
  const float* no = yes + x.shape[1];
  for_each_pooled(x, read, weight, eps, kernels(isa), [&](int64_t i, const float* pooled) {
    double margin = 0.0;
    for (int64_t j = 0; j < x.shape[1]; ++j) {
      margin += static_cast<double>(pooled[j]) * (yes[j] - no[j]);
    }
    out.as<float>()[i] = static_cast<float>(1.0 / (1.0 + std::exp(-margin)));
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
