// Products of float rows with panels of f32 or bf16 weights, what follows the sums, and integer
// products in plain C++. Included after rowwise.inl, in the same namespace.
//
// Each sum goes along K one step after the other, in one accumulator, so that it is the same
// whatever rows and panels are computed beside it.

constexpr int kVectors = static_cast<int>(kPanel) / kLanes;  // of a panel
// Accumulators, weights and one value of x fill the registers: 16 of them, or 32 with AVX-512.
constexpr int kRowGroup = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 2;
constexpr int64_t kBlockRows = 48;  // a multiple of all of them
constexpr int64_t kAhead = 1024;  // bytes: few rows wait for their weights from memory
constexpr int64_t kInner = 512;  // steps of K whose weights (16 KB in bf16) stay in L1

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
template <int R, int P, class T>
inline void float_tile(const float* x, int64_t x_stride, const uint8_t* w, int64_t pitch,
                       int64_t step, int64_t k, float* c, int64_t c_stride) {
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

template <class T>
inline void float_block(const BlockArgs& a) {
  const int64_t stride = a.row_bytes / 4;
  const int64_t columns = a.panels * kPanel;
  const auto* x = static_cast<const float*>(a.x);
  std::memset(a.c, 0, static_cast<size_t>(a.rows * columns) * 4);
  constexpr int64_t kStep = kPanel * static_cast<int64_t>(sizeof(T)) * Steps<T>::count;
  // Few rows: all of K at once reads each panel from its beginning to its end.
  const int64_t inner = a.rows <= kRowGroup ? a.weight->k_padded : kInner;
  for (int64_t k = 0; k < a.weight->k_padded; k += inner) {
    const int64_t length = std::min(inner, a.weight->k_padded - k);
    const uint8_t* w = a.weight->panel(a.panel) + k / Steps<T>::count * kStep;
    // A panel, or as many as few rows take at once, then all rows by it.
    const int64_t step = a.rows < kRowGroup ? a.panels : 1;
    for (int64_t p = 0; p < a.panels; p += step) {
      for (int64_t r = 0; r < a.rows; r += kRowGroup) {
        float_group<T>(std::min<int64_t>(kRowGroup, a.rows - r), x + r * stride + k, stride,
                       w + p * a.weight->panel_bytes, a.weight->panel_bytes, kStep,
                       std::min(step, a.panels - p), length, a.c + r * columns + p * kPanel,
                       columns);
      }
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

// `count` may end within a panel; scales and biases go on to its end.
inline void finish(const float* c, int64_t c_stride, int64_t rows, int64_t count, bool integer,
                   const Epilogue& e) {
  const bool gated = e.activation == Epilogue::Activation::swiglu;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < count; j += kPanel) {
      F values[kVectors];
      if (gated) {
        F up[kVectors];
        const int64_t column = 2 * j;
        finish_panel(c + r * c_stride + column, column, r, integer, e, values);
        finish_panel(c + r * c_stride + column + kPanel, column + kPanel, r, integer, e, up);
        for (int v = 0; v < kVectors; ++v) {
          values[v] = silu_of(values[v]) * up[v];
        }
      } else {
        finish_panel(c + r * c_stride + j, j, r, integer, e, values);
        for (int v = 0; v < kVectors; ++v) {
          values[v] = activate(values[v], e.activation);
        }
      }
      const int64_t wide = std::min(kPanel, count - j);
      if (e.residual != nullptr) {
        const void* from = static_cast<const char*>(e.residual) +
                           (r * e.residual_stride + j) * dtype_size(e.residual_dtype);
        alignas(64) float added[kPanel] = {};
        widen(from, e.residual_dtype, wide, added);
        for (int v = 0; v < kVectors; ++v) {
          values[v] = values[v] + load(added + v * kLanes);
        }
      }
      alignas(64) float row[kPanel];
      for (int v = 0; v < kVectors; ++v) {
        store(row + v * kLanes, values[v]);
      }
      void* to = static_cast<char*>(e.out) + (r * e.out_stride + j) * dtype_size(e.out_dtype);
      narrow(row, wide, e.out_dtype, to);
    }
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
