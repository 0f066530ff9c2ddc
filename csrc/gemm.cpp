#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace qvlfast {
namespace {

// Rows of x that are brought into form at once: their copy is reused for all panels, and 8 MB of
// them at K = 6144 stay in the last-level cache.
constexpr int64_t kChunkRows = 384;
// A task's columns: with its 48 or 64 rows, their sums (64 KB at most) and its rows of x stay in
// L2.
constexpr int64_t kBlockPanels = 16;

struct ActivationName {
  const char* name;
  Epilogue::Activation activation;
};
constexpr ActivationName kActivations[] = {
    {"none", Epilogue::Activation::none},         {"gelu_tanh", Epilogue::Activation::gelu_tanh},
    {"gelu_erf", Epilogue::Activation::gelu_erf}, {"silu", Epilogue::Activation::silu},
    {"swiglu", Epilogue::Activation::swiglu},
};

Epilogue::Activation activation_of(const std::string& name) {
  for (const ActivationName& known : kActivations) {
    if (name == known.name) {
      return known.activation;
    }
  }
  throw std::invalid_argument("activation '" + name +
                              "' is unknown; use none, gelu_tanh, gelu_erf, silu or swiglu");
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// bias as [panels · 16] in the order of the panels.
std::vector<float> bias_by_place(const PackedWeight& weight, const float* bias) {
  std::vector<float> placed(static_cast<size_t>(weight.panels * kPanel), 0.0F);
  for (int64_t place = 0; place < weight.panels * kPanel; ++place) {
    const int64_t channel = weight.channel(place);
    if (channel >= 0) {
      placed[static_cast<size_t>(place)] = bias[channel];
    }
  }
  return placed;
}

void* offset(const TensorView& t, int64_t row, int64_t column) {
  return static_cast<char*>(t.data) + (row * t.stride[0] + column) * dtype_size(t.dtype);
}

// One product after its operands were checked.
class Product {
 public:
  Product(const TensorView& x, const TensorView& x_scale, const PackedWeight& weight,
          const TensorView& bias, Epilogue::Activation activation, const TensorView& residual,
          const TensorView& y, const Kernels& kernels)
      : x_(x),
        weight_(weight),
        residual_(residual),
        y_(y),
        kernels_(kernels),
        activation_(activation),
        integer_(weight.format == Format::int8 || weight.format == Format::int4),
        given_scale_(x_scale.as<const float>()) {
    // Rows a power of two apart would share few sets of the caches.
    row_bytes_ = round_up(weight.k_padded * kernels.x_bytes(weight.format), 64) + 64;
    if (bias.data != nullptr) {
      bias_ = bias_by_place(weight, bias.as<const float>());
    }
  }

  void run() {
    static thread_local Scratch rows_memory;
    const int64_t m = x_.shape[0];
    for (int64_t first = 0; first < m; first += kChunkRows) {
      const int64_t rows = std::min(kChunkRows, m - first);
      // A last block may read up to 16 rows more than there are.
      const int64_t padded = round_up(rows, 16);
      rows_ = static_cast<char*>(rows_memory.get(padded * row_bytes_));
      std::memset(rows_ + rows * row_bytes_, 0, static_cast<size_t>((padded - rows) * row_bytes_));
      prepare(first, rows);
      multiply(first, rows);
    }
  }

 private:
  void prepare(int64_t first, int64_t rows) {
    if (integer_) {
      scale_.resize(static_cast<size_t>(rows));
      group_sum_.resize(static_cast<size_t>(rows * weight_.groups()));
    }
    parallel_for(rows, 4, [&](int64_t begin, int64_t end) {
      static thread_local Scratch wide_memory;
      const int64_t k = weight_.k;
      auto* wide = static_cast<float*>(wide_memory.get(k * 5));
      for (int64_t r = begin; r < end; ++r) {
        const void* from = x_.row(first + r);
        DType dtype = x_.dtype;
        if (integer_) {
          float& scale = scale_[static_cast<size_t>(r)];
          if (dtype == DType::s8) {
            scale = given_scale_[first + r];
          } else {
            auto* values = reinterpret_cast<int8_t*>(wide + k);
            kernels_.widen(from, dtype, k, wide);
            kernels_.quantise_row(wide, k, values, &scale);
            from = values;
            dtype = DType::s8;
          }
          sum_groups(static_cast<const int8_t*>(from), r);
        }
        kernels_.prepare_row(from, dtype, k, weight_.k_padded, weight_.format,
                             rows_ + r * row_bytes_);
      }
    });
  }

  void sum_groups(const int8_t* values, int64_t row) {
    const int64_t groups = weight_.groups();
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * weight_.group;
      const int64_t end = std::min(begin + weight_.group, weight_.k);
      int32_t sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        sum += values[i];
      }
      group_sum_[static_cast<size_t>(row * groups + g)] = sum;
    }
  }

  void multiply(int64_t first, int64_t rows) {
    const int64_t block_rows = kernels_.block_rows;
    const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
    const int64_t panel_blocks = (weight_.panels + kBlockPanels - 1) / kBlockPanels;
    // Neighbours share panels, which come from further away than rows.
    parallel_for(row_blocks * panel_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % row_blocks * block_rows;
        const int64_t panel = i / row_blocks * kBlockPanels;
        block(first, row, std::min(block_rows, rows - row), panel,
              std::min(kBlockPanels, weight_.panels - panel));
      }
    });
  }

  void block(int64_t first, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    static thread_local Scratch sums_memory;
    const int64_t columns = panels * kPanel;
    BlockArgs args;
    args.x = rows_ + row * row_bytes_;
    args.row_bytes = row_bytes_;
    args.rows = rows;
    args.weight = &weight_;
    args.panel = panel;
    args.panels = panels;
    args.group_sum = group_sum_.data() + row * weight_.groups();
    args.c = static_cast<float*>(sums_memory.get(kernels_.block_rows * columns * 4));
    kernels_.block(args);

    const int64_t place = panel * kPanel;
    const int64_t parts = weight_.gated ? 2 : 1;
    const int64_t column = place / parts;
    const int64_t count = std::min(columns / parts, weight_.n / parts - column);
    Epilogue e;
    e.activation = activation_;
    if (integer_) {
      e.x_scale = scale_.data() + row;
      e.w_scale = weight_.scale.data() + place;
    }
    if (!bias_.empty()) {
      e.bias = bias_.data() + place;
    }
    if (residual_.data != nullptr) {
      e.residual = offset(residual_, first + row, column);
      e.residual_stride = residual_.stride[0];
      e.residual_dtype = residual_.dtype;
    }
    e.out = offset(y_, first + row, column);
    e.out_stride = y_.stride[0];
    e.out_dtype = y_.dtype;
    kernels_.finish(args.c, columns, rows, count, integer_, e);
  }

  const TensorView& x_;
  const PackedWeight& weight_;
  const TensorView& residual_;
  const TensorView& y_;
  const Kernels& kernels_;
  const Epilogue::Activation activation_;
  const bool integer_;
  const float* given_scale_;
  int64_t row_bytes_ = 0;
  char* rows_ = nullptr;
  std::vector<float> bias_;
  std::vector<float> scale_;
  std::vector<int32_t> group_sum_;
};

}  // namespace

void gemm(const TensorView& x, const TensorView& x_scale, const PackedWeight& weight,
          const TensorView& bias, const std::string& activation, const TensorView& residual,
          const TensorView& y, Isa isa) {
  const Epilogue::Activation chosen = activation_of(activation);
  const bool swiglu = chosen == Epilogue::Activation::swiglu;
  if (swiglu != weight.gated) {
    throw std::invalid_argument("swiglu takes a gated weight, and nothing else does; activation '" +
                                activation + "' with a weight that is " +
                                (weight.gated ? "gated" : "not gated"));
  }
  const int64_t width = weight.gated ? weight.n / 2 : weight.n;
  switch (weight.format) {
    case Format::f32:
      require("x", x, {-1, weight.k}, {DType::f32, DType::u8});
      break;
    case Format::bf16:
      require("x", x, {-1, weight.k}, {DType::bf16, DType::u8});
      break;
    case Format::int8:
    case Format::int4:
      require("x", x, {-1, weight.k}, {DType::s8, DType::f32, DType::bf16});
  }
  const int64_t m = x.shape[0];
  if ((x.dtype == DType::s8) != (x_scale.data != nullptr)) {
    throw std::invalid_argument("x_scale belongs to int8 rows and to nothing else; x is " +
                                x.describe());
  }
  if (x_scale.data != nullptr) {
    require_dense("x_scale", x_scale, {m}, {DType::f32});
  }
  if (bias.data != nullptr) {
    require_dense("bias", bias, {weight.n}, {DType::f32});
  }
  if (residual.data != nullptr) {
    require("residual", residual, {m, width}, {DType::f32, DType::bf16});
  }
  require_distinct("out", y, {m, width}, {DType::f32, DType::bf16});
  if (m == 0) {
    return;
  }
  Product(x, x_scale, weight, bias, chosen, residual, y, kernels(isa)).run();
}

}  // namespace qvlfast
