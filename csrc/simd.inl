// Vectors of QVLFAST_LANES floats. Included once for each instruction set, inside a namespace of
// its own, so that the compiler picks that set's instructions and no two of them meet in the
// linker.

constexpr int kLanes = QVLFAST_LANES;

typedef float F __attribute__((vector_size(4 * QVLFAST_LANES)));
typedef int32_t I __attribute__((vector_size(4 * QVLFAST_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * QVLFAST_LANES)));
typedef uint16_t H __attribute__((vector_size(2 * QVLFAST_LANES)));
typedef uint8_t B __attribute__((vector_size(QVLFAST_LANES)));
typedef int8_t S __attribute__((vector_size(QVLFAST_LANES)));

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline F load(const float* p) { return load_as<F>(p); }
inline void store(float* p, F v) { store_as(p, v); }
inline F splat(float x) { return x - F{}; }
inline I splat(int32_t x) { return x - I{}; }
inline F as_float(U v) { return reinterpret_cast<F>(v); }
inline F as_float(I v) { return reinterpret_cast<F>(v); }
inline U as_bits(F v) { return reinterpret_cast<U>(v); }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }

inline F load_bf16(const uint16_t* p) {
  return as_float(__builtin_convertvector(load_as<H>(p), U) << 16);
}
// Rounds to nearest, ties to even; NaN stays NaN.
inline void store_bf16(uint16_t* p, F v) {
  const U bits = as_bits(v);
  const U rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const U nan = (bits >> 16) | 0x40U;
  const U chosen = (bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : rounded;
  store_as(p, __builtin_convertvector(chosen, H));
}

// The upper half of the first 2 · `width` lanes in place of the lower.
template <int width>
inline F upper_half(F v) {
  I from{};
  for (int i = 0; i < kLanes; ++i) {
    from[i] = i < width ? i + width : i;
  }
  return __builtin_shuffle(v, from);
}
template <int width = kLanes / 2>
inline float sum_of(F v) {
  const F halved = v + upper_half<width>(v);
  if constexpr (width > 1) {
    return sum_of<width / 2>(halved);
  }
  return halved[0];
}
template <int width = kLanes / 2>
inline float most_of(F v) {
  const F halved = max(v, upper_half<width>(v));
  if constexpr (width > 1) {
    return most_of<width / 2>(halved);
  }
  return halved[0];
}

// 1.5 · 2^23: added to a float of at most 2^22, it leaves the nearest integer in the low bits.
constexpr float kRound = 12582912.0F;

// 2^x within 2 units in the last place; 0 from -125.5 down, infinity from 128 up. NaN stays NaN: it
// goes through sums and products alone, since integer sums of its bits could make a number of it.
inline F exp2_of(F x) {
  // x rounded to n leaves n + 126 in the low bits, which is the exponent of 2^(n - 1), or 0.
  constexpr float kShift = kRound + 126.0F;
  const F low = splat(-126.0F);
  const F high = splat(128.0F);
  F clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  const F shifted = clamped + kShift;
  const F f = clamped - (shifted - kShift);  // -0.5 .. 0.5
  // 2 · 2^f, with (2^f - 1) / f through 6 Chebyshev nodes; the relative error is below 6e-9.
  F p = splat(2 * 1.545316294e-4F);
  p = p * f + 2 * 1.339086336e-3F;
  p = p * f + 2 * 9.618082557e-3F;
  p = p * f + 2 * 5.550357114e-2F;
  p = p * f + 2 * 2.402265076e-1F;
  p = p * f + 2 * 6.931471880e-1F;
  p = p * f + 2.0F;
  return p * as_float(as_bits(shifted) << 23);
}

inline F exp_of(F x) { return exp2_of(x * 1.44269504088896341F); }
inline F sigmoid_of(F x) { return 1.0F / (1.0F + exp_of(-x)); }
inline F silu_of(F x) { return x * sigmoid_of(x); }

// x · Φ(x) by the tanh formula: 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)).
inline F gelu_tanh_of(F x) {
  const F u = 0.7978845608028654F * (x + 0.044715F * x * x * x);
  return x * sigmoid_of(2.0F * u);
}

// x · Φ(x). erfc is Chebyshev's fit in 1 / (1 + z / 2), relative error 1.2e-7 (Press et al.,
// Numerical Recipes, section 6.2).
inline F gelu_erf_of(F x) {
  const F z = max(x, -x) * 0.70710678118654752F;
  const F t = 1.0F / (1.0F + 0.5F * z);
  F p = splat(0.17087277F);
  p = p * t - 0.82215223F;
  p = p * t + 1.48851587F;
  p = p * t - 1.13520398F;
  p = p * t + 0.27886807F;
  p = p * t - 0.18628806F;
  p = p * t + 0.09678418F;
  p = p * t + 0.37409196F;
  p = p * t + 1.00002368F;
  p = p * t - 1.26551223F;
  const F tail = 0.5F * t * exp_of(p - z * z);
  return x * (x < F{} ? tail : 1.0F - tail);
}
