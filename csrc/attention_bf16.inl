// Attention with operands in bfloat16. Included after attention.inl, in the same namespace; needs
// vectors of 16. `Products` multiplies:
//
//   kRows             rows that it takes at once
//   multiply(x, row_bytes, rows, panels_at, pitch, panels, steps, c, c_stride)
//                     c += rows of bf16 times panels of `steps` · 64 bytes, `pitch` bytes apart;
//                     or c = with multiply<true>

// 2^x for x of at most 0, relative error 3e-6, and 0 far below; NaN stays NaN. A weight is rounded
// to 8 bits next, so five coefficients do.
inline F exp2_short(F x) {
#if defined(QVLFAST_EMULATE)
  return exp2_of(x);
#else
  // Where x is NaN, max returns its second operand. Masks of ones: GCC 12 warns of the plain forms.
  const __m512 clamped = _mm512_maskz_max_ps(0xFFFF, _mm512_set1_ps(-150.0F), x);
  const F f = _mm512_reduce_ps(clamped, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  F p = splat(1.353416672e-02F);
  p = p * f + 5.201146290e-02F;
  p = p * f + 2.414427555e-01F;
  p = p * f + 6.930038347e-01F;
  p = p * f + 1.000002593e+00F;
  return _mm512_maskz_scalef_ps(0xFFFF, p, clamped);  // p · 2^floor(x)
#endif
}

template <class Products>
struct HalfAttention {
  using Weight = uint16_t;

  static constexpr int64_t kRows = Products::kRows;
  static constexpr int64_t kKeys = 32;

  static void score(const AttentionArgs& a, const KeyBlock& block, int64_t row, int64_t rows,
                    int64_t keys, float* scores) {
    const int64_t steps = a.q_width / 2;
    const auto* q = static_cast<const uint16_t*>(a.q) + row * a.q_width;
    Products::template multiply<true>(reinterpret_cast<const uint8_t*>(q), 2 * a.q_width, rows,
                                      static_cast<const uint8_t*>(block.keys), steps * 64,
                                      keys / kPanel, steps, scores, kKeyBlock);
  }

  static float weigh(float* scores, int64_t keys, float scale, float most, uint16_t* weights) {
    F total = F{};
    const F shift = splat(most * scale);
    for (int64_t j = 0; j < keys; j += kLanes) {
      const F p = exp2_short(load(scores + j) * scale - shift);
      store_half(weights + j, p);
      total += p;
    }
    return sum_of(total);
  }

  static void add_values(const AttentionArgs& a, const KeyBlock& block, int64_t row, int64_t rows,
                         int64_t keys, const uint16_t* weights) {
    Products::template multiply<false>(reinterpret_cast<const uint8_t*>(weights), 2 * kKeyBlock,
                                       rows, static_cast<const uint8_t*>(block.values),
                                       block.count / 2 * 64, a.width / kPanel, keys / 2,
                                       a.accumulated + row * a.width, a.width);
  }

 private:
  static void store_half(uint16_t* p, F v) {
#if defined(QVLFAST_EMULATE)
    store_bf16(p, v);
#else
    store_as(p, _mm512_cvtneps_pbh(v));
#endif
  }
};
