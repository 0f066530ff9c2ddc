// Work on single rows. Included after simd.inl, in the same namespace.

inline void widen(const void* x, DType dtype, int64_t n, float* out) {
  int64_t i = 0;
  if (dtype == DType::f32) {
    std::memcpy(out, x, static_cast<size_t>(n) * 4);
    return;
  }
  if (dtype == DType::bf16) {
    const auto* narrow = static_cast<const uint16_t*>(x);
    for (; i + kLanes <= n; i += kLanes) {
      store(out + i, load_bf16(narrow + i));
    }
  }
  for (; i < n; ++i) {
    out[i] = dtype == DType::u8 ? static_cast<float>(static_cast<const uint8_t*>(x)[i])
                                : read_float(x, dtype, i);
  }
}

inline void narrow(const float* x, int64_t n, DType dtype, void* out) {
  if (dtype == DType::f32) {
    std::memcpy(out, x, static_cast<size_t>(n) * 4);
    return;
  }
  auto* halves = static_cast<uint16_t*>(out);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store_bf16(halves + i, load(x + i));
  }
  for (; i < n; ++i) {
    halves[i] = to_bf16(x[i]);
  }
}

// bfloat16 as it is, or from uint8, of which every value is exact.
inline void copy_halves(const void* x, DType dtype, int64_t n, uint16_t* out) {
  if (dtype == DType::bf16) {
    std::memcpy(out, x, static_cast<size_t>(n) * 2);
    return;
  }
  const auto* bytes = static_cast<const uint8_t*>(x);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<uint16_t>(float_to_bits(static_cast<float>(bytes[i])) >> 16);
  }
}

// scale = max(|x|, 1e-30) / 127, ties to even; a row with NaN or infinity in it gets zeros and NaN.
inline void quantise_row(const float* x, int64_t n, int8_t* values, float* scale) {
  // The largest bits are those of the largest magnitude, and of NaN before any number.
  U most_bits = U{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const U bits = as_bits(load(x + i)) & 0x7FFFFFFFU;
    most_bits = bits > most_bits ? bits : most_bits;
  }
  uint32_t most = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    most = most > most_bits[lane] ? most : most_bits[lane];
  }
  for (int64_t j = i; j < n; ++j) {
    const uint32_t bits = float_to_bits(x[j]) & 0x7FFFFFFFU;
    most = most > bits ? most : bits;
  }
  if (most >= 0x7F800000U) {
    std::memset(values, 0, static_cast<size_t>(n));
    *scale = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const float found = bits_to_float(most);
  const float bound = found > 1e-30F ? found : 1e-30F;
  const float factor = 127.0F / bound;
  *scale = bound / 127.0F;
  const F limit = splat(127.0F);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    F scaled = max(min(load(x + i) * factor, limit), -limit);
    // Else the compiler makes one instruction of the product and the sum, which rounds but once.
    __asm__("" : "+m"(scaled));
    const F shifted = scaled + kRound;
    const I integers = reinterpret_cast<I>(as_bits(shifted)) - 0x4B400000;
    store_as(values + i, __builtin_convertvector(integers, S));
  }
  for (; i < n; ++i) {
    const float product = x[i] * factor;
    const float scaled = product > 127.0F ? 127.0F : product < -127.0F ? -127.0F : product;
    values[i] = static_cast<int8_t>(std::nearbyint(scaled));
  }
}

// Multiplier and values of one group, in units of the channel's scale: of the multipliers from the
// least that clips nothing down, the one that errs least.
inline float round_group(const float* scaled, int64_t group, F factor, float* rounded) {
  const F limit = splat(7.0F);
  F total = F{};
  for (int64_t i = 0; i < group; i += kLanes) {
    const F x = load(scaled + i);
    const F clamped = max(min(x / factor, limit), -limit);
    const F whole = clamped + kRound - kRound;
    store(rounded + i, whole);
    const F error = whole * factor - x;
    total += error * error;
  }
  return sum_of(total);
}

inline void quantise_int4_row(float* x, int64_t n, int64_t group, uint8_t* pairs,
                              uint8_t* multiplier, float* scale) {
  constexpr float kMost = 7.0F;
  constexpr float kMultipliers = 18.0F;
  constexpr int kTried = 4;
  uint32_t most_bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    most_bits = std::max(most_bits, float_to_bits(x[i]) & 0x7FFFFFFFU);
  }
  const int64_t groups = (n + group - 1) / group;
  std::memset(x + n, 0, static_cast<size_t>(groups * group - n) * 4);
  if (most_bits >= 0x7F800000U) {  // NaN or infinity
    std::memset(pairs, 0x88, static_cast<size_t>(n / 2));
    std::memset(multiplier, 1, static_cast<size_t>(groups));
    *scale = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const float unit = std::max(bits_to_float(most_bits), 1e-30F) / (kMost * kMultipliers);
  // Rounded up to 16 significant bits: its product with a multiplier is exact, so that a file which
  // holds the products alone gives both back.
  *scale = bits_to_float((float_to_bits(unit) + 255U) & ~255U);
  const F divisor = splat(*scale);
  for (int64_t g = 0; g < groups; ++g) {
    float* own = x + g * group;
    float most = 0.0F;
    for (int64_t i = 0; i < group; i += kLanes) {
      const F scaled = load(own + i) / divisor;
      store(own + i, scaled);
      most = std::max(most, most_of(max(scaled, -scaled)));
    }
    const float unclipped = std::min(std::max(std::ceil(most / kMost), 1.0F), kMultipliers);
    alignas(64) float tried[2][128];
    int best = 0;
    float least = std::numeric_limits<float>::infinity();
    for (int below = 0; below < kTried; ++below) {
      const float factor = unclipped - static_cast<float>(below);
      if (factor < 1.0F) {
        break;
      }
      const float error = round_group(own, group, splat(factor), tried[1 - best]);
      if (error < least) {
        least = error;
        best = 1 - best;
        multiplier[g] = static_cast<uint8_t>(factor);
      }
    }
    const int64_t used = std::min(group, n - g * group);
    for (int64_t i = 0; i < used; i += 2) {
      const int low = static_cast<int>(tried[best][i]) + 8;
      const int high = static_cast<int>(tried[best][i + 1]) + 8;
      pairs[(g * group + i) / 2] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

inline float sum_of_squares(const float* x, int64_t n) {
  F a = F{};
  F b = F{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const F first = load(x + i);
    const F second = load(x + i + kLanes);
    a += first * first;
    b += second * second;
  }
  float sum = sum_of(a + b);
  for (; i < n; ++i) {
    sum += x[i] * x[i];
  }
  return sum;
}

inline void rms_norm_row(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const float factor = 1.0F / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(out + i, load(x + i) * factor * load(weight + i));
  }
  for (; i < n; ++i) {
    out[i] = x[i] * factor * weight[i];
  }
}

inline void layer_norm_row(const float* x, const float* weight, const float* bias, int64_t n,
                           float eps, float* out) {
  F total = F{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    total += load(x + i);
  }
  float mean = sum_of(total);
  for (; i < n; ++i) {
    mean += x[i];
  }
  mean /= static_cast<float>(n);
  F squares = F{};
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const F centred = load(x + i) - mean;
    store(out + i, centred);
    squares += centred * centred;
  }
  float variance = sum_of(squares);
  for (; i < n; ++i) {
    out[i] = x[i] - mean;
    variance += out[i] * out[i];
  }
  const float factor = 1.0F / std::sqrt(variance / static_cast<float>(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    store(out + i, load(out + i) * factor * load(weight + i) + load(bias + i));
  }
  for (; i < n; ++i) {
    out[i] = out[i] * factor * weight[i] + bias[i];
  }
}

inline void rope_head(const float* x, const float* cos, const float* sin, int64_t half,
                      float* out) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F first = load(x + i);
    const F second = load(x + half + i);
    const F c = load(cos + i);
    const F s = load(sin + i);
    store(out + i, first * c - second * s);
    store(out + half + i, second * c + first * s);
  }
  for (; i < half; ++i) {
    const float first = x[i];
    const float second = x[half + i];
    out[i] = first * cos[i] - second * sin[i];
    out[half + i] = second * cos[i] + first * sin[i];
  }
}
