// Products with the dot-product instructions of AVX-512. Included after gemm.inl, in the same
// namespace; needs vectors of 16, which is a panel.
//
// QVLFAST_EMULATE replaces the instructions by plain C++, so that everything around them can be
// tested on processors without them.

// sum + the products of pairs of bfloat16. The instruction rounds less often than the emulation.
struct DotBf16 {
  using Sum = F;  // an integer would cost GCC 12 a move each time
  static Sum dot(Sum sum, I x, I w) {
#if defined(QVLFAST_EMULATE)
    const Sum s = sum + as_float(x << 16) * as_float(w << 16);
    return s + as_float(x & -65536) * as_float(w & -65536);
#else
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
#endif
  }
};

// sum + the products of four uint8 by four int8, exactly.
inline I dot_bytes(I sum, I bytes, I signed_bytes) {
#if defined(QVLFAST_EMULATE)
  for (int lane = 0; lane < 16; ++lane) {
    for (int i = 0; i < 32; i += 8) {
      sum[lane] += static_cast<int32_t>(static_cast<uint8_t>(bytes[lane] >> i)) *
                   static_cast<int8_t>(signed_bytes[lane] >> i);
    }
  }
  return sum;
#else
  return reinterpret_cast<I>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                 reinterpret_cast<__m512i>(bytes),
                                                 reinterpret_cast<__m512i>(signed_bytes)));
#endif
}

// x is int8 with 128 added.
struct DotInt8 {
  using Sum = I;
  static Sum dot(Sum sum, I x, I w) { return dot_bytes(sum, x, w); }
};

inline I splat_four(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return splat(four);
}

// Rows that go through all of K at once, so that their weights come from memory once.
constexpr int kFewRows = 16;

// c [R][P · 16] += x · P panels; a step is 4 bytes of a row and 64 of each panel.
template <int R, int P, class Op>
inline void dot_tile(const uint8_t* x, int64_t row_bytes, const uint8_t* w, int64_t pitch,
                     int64_t steps, int32_t* c, int64_t c_stride) {
  using Sum = typename Op::Sum;
  Sum sums[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      sums[r][p] = load_as<Sum>(c + r * c_stride + p * kPanel);
    }
  }
  for (int64_t i = 0; i < steps; ++i, x += 4, w += 64) {
    I weights[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      if constexpr (R != kRowGroup) {
        __builtin_prefetch(w + p * pitch + kAhead);
      }
      weights[p] = load_as<I>(w + p * pitch);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const I value = splat_four(x + r * row_bytes);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        sums[r][p] = Op::dot(sums[r][p], value, weights[p]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      store_as(c + r * c_stride + p * kPanel, sums[r][p]);
    }
  }
}

template <class Op, int R = kFewRows>
inline void dot_group(int64_t rows, const uint8_t* x, int64_t row_bytes, const uint8_t* w,
                      int64_t pitch, int64_t panels, int64_t steps, int32_t* c, int64_t c_stride) {
  if constexpr (R > 1) {
    if (rows < R) {
      dot_group<Op, R - 1>(rows, x, row_bytes, w, pitch, panels, steps, c, c_stride);
      return;
    }
  }
  constexpr int P = R <= 6 ? 4 : R <= kRowGroup ? 2 : 1;
  int64_t p = 0;
  for (; p + P <= panels; p += P) {
    dot_tile<R, P, Op>(x, row_bytes, w + p * pitch, pitch, steps, c + p * kPanel, c_stride);
  }
  for (; p < panels; ++p) {
    dot_tile<R, 1, Op>(x, row_bytes, w + p * pitch, pitch, steps, c + p * kPanel, c_stride);
  }
}

// c begins with what the sums begin with.
template <class Op>
inline void dot_block(const BlockArgs& a) {
  const int64_t columns = a.panels * kPanel;
  const int64_t pitch = a.weight->panel_bytes;
  const int64_t all_steps = pitch / 64;
  const bool few = a.rows <= kFewRows;
  const int64_t inner = few ? all_steps : 256;  // 16 KB of a panel
  const int64_t at_once = few ? a.panels : 2;
  const int64_t group = few ? a.rows : kRowGroup;
  const auto* x = static_cast<const uint8_t*>(a.x);
  auto* c = reinterpret_cast<int32_t*>(a.c);
  for (int64_t i = 0; i < all_steps; i += inner) {
    const int64_t steps = std::min(inner, all_steps - i);
    for (int64_t p = 0; p < a.panels; p += at_once) {
      for (int64_t r = 0; r < a.rows; r += group) {
        dot_group<Op>(std::min(group, a.rows - r), x + r * a.row_bytes + 4 * i, a.row_bytes,
                      a.weight->panel(a.panel + p) + 64 * i, pitch, std::min(at_once, a.panels - p),
                      steps, c + r * columns + p * kPanel, columns);
      }
    }
  }
}

inline void dot_bf16_block(const BlockArgs& a) {
  std::memset(a.c, 0, static_cast<size_t>(a.rows * a.panels * kPanel) * 4);
  dot_block<DotBf16>(a);
}

inline void dot_int8_block(const BlockArgs& a) {
  const int64_t columns = a.panels * kPanel;
  const int32_t* sums = a.weight->column_sum.data() + a.panel * kPanel;
  auto* c = reinterpret_cast<int32_t*>(a.c);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      c[r * columns + j] = -128 * sums[j];
    }
  }
  dot_block<DotInt8>(a);
}

// int4: the weights, 0..15, are the unsigned side. Each group is summed apart, from minus 8 times
// the sum of x on, and multiplied once.
template <int R>
inline void dot_int4_tile(const uint8_t* x, int64_t row_bytes, const uint8_t* w,
                          const uint8_t* factors, const int32_t* group_sum, int64_t groups,
                          int64_t group, int32_t* c, int64_t c_stride) {
  I totals[R] = {};
  int64_t k = 0;
  for (int64_t g = 0; g < groups; ++g, factors += kPanel) {
    I sums[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      sums[r] = splat(-8 * group_sum[r * groups + g]);
    }
    for (const int64_t end = k + group; k < end; k += 8, w += 64) {
      const I both = load_as<I>(w);
      const I low = both & 0x0F0F0F0F;
      const I high = (both >> 4) & 0x0F0F0F0F;
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        sums[r] = dot_bytes(sums[r], low, splat_four(x + r * row_bytes + k));
        sums[r] = dot_bytes(sums[r], high, splat_four(x + r * row_bytes + k + 4));
      }
    }
    const I factor = __builtin_convertvector(load_as<B>(factors), I);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      totals[r] += sums[r] * factor;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store_as(c + r * c_stride, totals[r]);
  }
}

template <int R = kRowGroup>
inline void dot_int4_group(int64_t rows, const uint8_t* x, int64_t row_bytes, const uint8_t* w,
                           const uint8_t* factors, const int32_t* group_sum, int64_t groups,
                           int64_t group, int32_t* c, int64_t c_stride) {
  if constexpr (R > 1) {
    if (rows < R) {
      dot_int4_group<R - 1>(rows, x, row_bytes, w, factors, group_sum, groups, group, c, c_stride);
      return;
    }
  }
  dot_int4_tile<R>(x, row_bytes, w, factors, group_sum, groups, group, c, c_stride);
}

inline void dot_int4_block(const BlockArgs& a) {
  const int64_t columns = a.panels * kPanel;
  const int64_t groups = a.weight->groups();
  for (int64_t p = 0; p < a.panels; ++p) {
    const int64_t panel = a.panel + p;
    for (int64_t r = 0; r < a.rows; r += kRowGroup) {
      dot_int4_group(std::min<int64_t>(kRowGroup, a.rows - r),
                     static_cast<const uint8_t*>(a.x) + r * a.row_bytes, a.row_bytes,
                     a.weight->panel(panel), a.weight->multiplier.data() + panel * groups * kPanel,
                     a.group_sum + r * groups, groups, a.weight->group,
                     reinterpret_cast<int32_t*>(a.c) + r * columns + p * kPanel, columns);
    }
  }
}
