// Products of float rows with panels of f32 or bf16 weights, what follows the sums, and integer
// products in plain C++. Included after rowwise.inl, in the same namespace.
//
// Each sum goes along K one step after the other, in one accumulator, so that it is the same
// whatever rows and panels are computed beside it.

constexpr int kVectors = static_cast<int>(kPanel) / kLanes;  // of a panel
// Accumulators, weights and one value of x fill the registers: 16 of them, or 32 with AVX-512.
constexpr int kRowGroup = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 2;
constexpr int64_t kBlockRows = 48;  // a multiple of all of them
constexpr int64_t kAhead = 1024;    // bytes: few rows wait for their weights from memory
constexpr int64_t kInner = 512;     // steps of K whose weights stay near
constexpr int64_t kWidened = 256;   // those that are widened at once: 16 KB, half of L1

// The rows of a block in groups of about the same size, each of which goes through the same panels.
struct RowGroups {
  int64_t rows;
  int64_t count;

  RowGroups(int64_t all, int64_t most) : rows(all), count((all + most - 1) / most) {}

  int64_t begin(int64_t group) const { return rows * group / count; }
  int64_t most() const { return (rows + count - 1) / count; }
};

// One step along K for f32, two for bf16: `weights` are those of even, then of odd steps.
template <class T>
struct Steps;

template <>
struct Steps<float> {
  static constexpr int count = 1;
  static void load_panel(const uint8_t* p, F (*weights)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
      weights[0][v] = load(reinterpret_cast<const float*>(p) + v * kLanes);
    }
  }
};

template <>
struct Steps<uint16_t> {
  static constexpr int count = 2;
  static void load_panel(const uint8_t* p, F (*weights)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
      const U pair = load_as<U>(p + v * kLanes * 4);
      weights[0][v] = as_float(pair << 16);
      weights[1][v] = as_float(pair & 0xFFFF0000U);
    }
  }
};

// c [R][P · 16] += x [R][k] · P panels, which are `pitch` bytes apart; a step of K is `step` bytes.
// Out of line, as the tiles of AVX2 are: in one large function GCC 12 keeps sums on the stack.
template <int R, int P, class T>
__attribute__((noinline)) void float_tile(const float* x, int64_t x_stride, const uint8_t* w,
                                          int64_t pitch, int64_t step, int64_t k, float* c,
                                          int64_t c_stride) {
  F sums[R][P][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][p][v] = load(c + r * c_stride + p * kPanel + v * kLanes);
      }
    }
  }
  constexpr int kSteps = Steps<T>::count;
  for (int64_t i = 0; i < k; i += kSteps, w += step) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if constexpr (R < kRowGroup) {
        __builtin_prefetch(w + p * pitch + kAhead);
      }
      F weights[kSteps][kVectors];
      Steps<T>::load_panel(w + p * pitch, weights);
#pragma GCC unroll 2
      for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const F value = splat(x[r * x_stride + i + s]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            sums[r][p][v] += value * weights[s][v];
          }
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store(c + r * c_stride + p * kPanel + v * kLanes, sums[r][p][v]);
      }
    }
  }
}

// Few rows take several panels at once, for enough independent sums.
template <int R>
constexpr int panels_at_once() {
  constexpr int kSums = kLanes == 16 ? 24 : kLanes == 8 ? 12 : 8;
  constexpr int kFit = kSums / (R * kVectors);
  return kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
}

template <int R, class T>
inline void float_rows(const float* x, int64_t x_stride, const uint8_t* w, int64_t pitch,
                       int64_t step, int64_t panels, int64_t k, float* c, int64_t c_stride) {
  constexpr int P = panels_at_once<R>();
  int64_t p = 0;
  for (; p + P <= panels; p += P) {
    float_tile<R, P, T>(x, x_stride, w + p * pitch, pitch, step, k, c + p * kPanel, c_stride);
  }
  for (; p < panels; ++p) {
    float_tile<R, 1, T>(x, x_stride, w + p * pitch, pitch, step, k, c + p * kPanel, c_stride);
  }
}

template <class T, int R = kRowGroup>
inline void float_group(int64_t rows, const float* x, int64_t x_stride, const uint8_t* w,
                        int64_t pitch, int64_t step, int64_t panels, int64_t k, float* c,
                        int64_t c_stride) {
  if constexpr (R > 1) {
    if (rows < R) {
      float_group<T, R - 1>(rows, x, x_stride, w, pitch, step, panels, k, c, c_stride);
      return;
    }
  }
  float_rows<R, T>(x, x_stride, w, pitch, step, panels, k, c, c_stride);
}

// Steps of a bfloat16 panel in float32.
inline void widen_steps(const uint8_t* w, int64_t length, float* out) {
  for (int64_t i = 0; i < length; i += 2, w += 4 * kPanel, out += 2 * kPanel) {
    __builtin_prefetch(w + kAhead);
    F weights[2][kVectors];
    Steps<uint16_t>::load_panel(w, weights);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(out + v * kLanes, weights[0][v]);
      store(out + kPanel + v * kLanes, weights[1][v]);
    }
  }
}

// Steps [k, k + length) of `panels` panels at w, `pitch` bytes apart, for all rows.
template <class T>
inline void float_panels(const BlockArgs& a, int64_t k, int64_t length, int64_t panel,
                         int64_t panels, const uint8_t* w, int64_t pitch) {
  const int64_t stride = a.row_bytes / 4;
  const int64_t columns = a.panels * kPanel;
  const RowGroups groups(a.rows, kRowGroup);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t r = groups.begin(g);
    float_group<T>(groups.begin(g + 1) - r, static_cast<const float*>(a.x) + r * stride + k, stride,
                   w, pitch, kPanel * static_cast<int64_t>(sizeof(T)) * Steps<T>::count, panels,
                   length, a.c + r * columns + panel * kPanel, columns);
  }
}

template <class T>
inline void float_block(const BlockArgs& a) {
  std::memset(a.c, 0, static_cast<size_t>(a.rows * a.panels * kPanel) * 4);
  const int64_t k_end = a.weight->k_padded;
  const int64_t pitch = a.weight->panel_bytes;
  if (a.rows <= kRowGroup) {
    // All of K at once reads each panel from its beginning to its end.
    float_panels<T>(a, 0, k_end, 0, a.panels, a.weight->panel(a.panel), pitch);
    return;
  }
  // A part of a panel, then all rows by it. That of bfloat16 is widened once for all of them.
  constexpr int64_t kSize = sizeof(T);
  constexpr int64_t kLength = kSize == 2 ? kWidened : kInner;
  alignas(64) float wide[kWidened * kPanel];
  for (int64_t k = 0; k < k_end; k += kLength) {
    const int64_t length = std::min(kLength, k_end - k);
    for (int64_t p = 0; p < a.panels; ++p) {
      const uint8_t* w = a.weight->panel(a.panel + p) + k * kPanel * kSize;
      if constexpr (kSize == 2) {
        widen_steps(w, length, wide);
        w = reinterpret_cast<const uint8_t*>(wide);
      }
      float_panels<float>(a, k, length, p, 1, w, 0);
    }
  }
}

inline F activate(F v, Epilogue::Activation activation) {
  switch (activation) {
    case Epilogue::Activation::gelu_tanh:
      return gelu_tanh_of(v);
    case Epilogue::Activation::gelu_erf:
      return gelu_erf_of(v);
    case Epilogue::Activation::silu:
      return silu_of(v);
    default:
      return v;
  }
}

// Sums of 16 columns, scaled and with their bias.
inline void finish_panel(const float* c, int64_t column, int64_t row, bool integer,
                         const Epilogue& e, F (&out)[kVectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = column + v * kLanes;
    F value =
        integer ? __builtin_convertvector(load_as<I>(c + v * kLanes), F) : load(c + v * kLanes);
    if (integer) {
      value = value * (e.x_scale[row] * load(e.w_scale + at));
    }
    if (e.bias != nullptr) {
      value = value + load(e.bias + at);
    }
    out[v] = value;
  }
}

// kLanes values of either float dtype at column j of a row.
inline F load_floats(const void* row, DType dtype, int64_t j) {
  return dtype == DType::f32 ? load(static_cast<const float*>(row) + j)
                             : load_bf16(static_cast<const uint16_t*>(row) + j);
}
inline void store_floats(void* row, DType dtype, int64_t j, F v) {
  if (dtype == DType::f32) {
    store(static_cast<float*>(row) + j, v);
  } else {
    store_bf16(static_cast<uint16_t*>(row) + j, v);
  }
}

// The first `wide` columns of a panel of results, from column j of a row on.
inline void store_panel(F (&values)[kVectors], const Epilogue& e, const char* residual, char* out,
                        int64_t j, int64_t wide) {
  if (wide == kPanel) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (residual != nullptr) {
        values[v] += load_floats(residual, e.residual_dtype, j + v * kLanes);
      }
      store_floats(out, e.out_dtype, j + v * kLanes, values[v]);
    }
    return;
  }
  alignas(64) float row[kPanel] = {};
  if (residual != nullptr) {
    widen(residual + j * dtype_size(e.residual_dtype), e.residual_dtype, wide, row);
  }
  for (int v = 0; v < kVectors; ++v) {
    store(row + v * kLanes, values[v] + load(row + v * kLanes));
  }
  narrow(row, wide, e.out_dtype, out + j * dtype_size(e.out_dtype));
}

// `count` may end within a panel; scales and biases go on to its end.
template <Epilogue::Activation kActivation>
inline void finish_with(const float* c, int64_t c_stride, int64_t rows, int64_t count, bool integer,
                        const Epilogue& e) {
  constexpr bool kGated = kActivation == Epilogue::Activation::swiglu;
  const int64_t residual_bytes = e.residual_stride * dtype_size(e.residual_dtype);
  const int64_t out_bytes = e.out_stride * dtype_size(e.out_dtype);
  for (int64_t r = 0; r < rows; ++r, c += c_stride) {
    const char* residual =
        e.residual == nullptr ? nullptr : static_cast<const char*>(e.residual) + r * residual_bytes;
    char* out = static_cast<char*>(e.out) + r * out_bytes;
    for (int64_t j = 0; j < count; j += kPanel) {
      F values[kVectors];
      const int64_t column = kGated ? 2 * j : j;
      finish_panel(c + column, column, r, integer, e, values);
      if constexpr (kGated) {
        F up[kVectors];
        finish_panel(c + column + kPanel, column + kPanel, r, integer, e, up);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          values[v] = silu_of(values[v]) * up[v];
        }
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          values[v] = activate(values[v], kActivation);
        }
      }
      store_panel(values, e, residual, out, j, std::min(kPanel, count - j));
    }
  }
}

inline void finish(const float* c, int64_t c_stride, int64_t rows, int64_t count, bool integer,
                   const Epilogue& e) {
  using Activation = Epilogue::Activation;
  switch (e.activation) {
    case Activation::none:
      return finish_with<Activation::none>(c, c_stride, rows, count, integer, e);
    case Activation::gelu_tanh:
      return finish_with<Activation::gelu_tanh>(c, c_stride, rows, count, integer, e);
    case Activation::gelu_erf:
      return finish_with<Activation::gelu_erf>(c, c_stride, rows, count, integer, e);
    case Activation::silu:
      return finish_with<Activation::silu>(c, c_stride, rows, count, integer, e);
    case Activation::swiglu:
      return finish_with<Activation::swiglu>(c, c_stride, rows, count, integer, e);
  }
}

// Integer products without special instructions. x is int8.
inline void plain_int8_block(const BlockArgs& a) {
  const int64_t columns = a.panels * kPanel;
  for (int64_t r = 0; r < a.rows; ++r) {
    const auto* x = static_cast<const int8_t*>(a.x) + r * a.row_bytes;
    auto* c = reinterpret_cast<int32_t*>(a.c) + r * columns;
    for (int64_t p = 0; p < a.panels; ++p) {
      const auto* w = reinterpret_cast<const int8_t*>(a.weight->panel(a.panel + p));
      int32_t sums[kPanel] = {};
      for (int64_t k = 0; k < a.weight->k_padded; k += 4, w += 4 * kPanel) {
        for (int64_t i = 0; i < kPanel; ++i) {
          for (int64_t j = 0; j < 4; ++j) {
            sums[i] += x[k + j] * w[4 * i + j];
          }
        }
      }
      std::memcpy(c + p * kPanel, sums, sizeof sums);
    }
  }
}

inline void plain_int4_block(const BlockArgs& a) {
  const int64_t columns = a.panels * kPanel;
  const PackedWeight& weight = *a.weight;
  for (int64_t r = 0; r < a.rows; ++r) {
    const auto* x = static_cast<const int8_t*>(a.x) + r * a.row_bytes;
    auto* c = reinterpret_cast<int32_t*>(a.c) + r * columns;
    for (int64_t p = 0; p < a.panels; ++p) {
      const uint8_t* w = weight.panel(a.panel + p);
      const uint8_t* factors = weight.multiplier.data() + (a.panel + p) * weight.groups() * kPanel;
      int32_t sums[kPanel] = {};
      for (int64_t g = 0; g < weight.groups(); ++g, factors += kPanel) {
        int32_t parts[kPanel] = {};
        for (int64_t k = g * weight.group; k < (g + 1) * weight.group; k += 8, w += 4 * kPanel) {
          for (int64_t i = 0; i < kPanel; ++i) {
            for (int64_t j = 0; j < 4; ++j) {
              const uint8_t byte = w[4 * i + j];
              parts[i] += x[k + j] * ((byte & 15) - 8) + x[k + 4 + j] * ((byte >> 4) - 8);
            }
          }
        }
        for (int64_t i = 0; i < kPanel; ++i) {
          sums[i] += parts[i] * factors[i];
        }
      }
      std::memcpy(c + p * kPanel, sums, sizeof sums);
    }
  }
}
