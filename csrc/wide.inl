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

// Keeps GCC from computing a pointer from another.
inline void keep_apart(const uint8_t*& p) { asm("" : "+r"(p)); }

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

// Steps of K, 192 KB of a panel, whose weights for two or three panels stay in L2.
constexpr int64_t kMostSteps = 3072;

// Panels that so many rows are multiplied by at once: enough sums to wait for none, and as few
// loads to a product as the registers allow.
constexpr int panels_at_once_of(int rows) { return rows <= 6 ? 4 : rows <= 8 ? 3 : 2; }

// Weights that are needed next: at each step of K those at `from` are asked for, which then goes
// `step` bytes on.
struct Ahead {
  const uint8_t* from;
  int64_t step;

  Ahead panel(int64_t bytes) const { return {from + bytes, step}; }
  void fetch(int64_t bytes) const { __builtin_prefetch(from + bytes); }
  void go_on() { from += step; }
};

// Where everything is in the caches already.
struct Nothing {
  Nothing panel(int64_t) const { return {}; }
  void fetch(int64_t) const {}
  void go_on() {}
};

// c [R][P · 16] += x · P panels, or = if kAnew; a step is 4 bytes of a row and 64 of each panel.
// Next is Ahead or Nothing.
template <int R, int P, class Op, bool kAnew, class Next>
inline void dot_tile(const uint8_t* x, int64_t row_bytes, const uint8_t* w, int64_t pitch,
                     int64_t steps, Next ahead, int32_t* c, int64_t c_stride) {
  using Sum = typename Op::Sum;
  constexpr int kThrees = (R + 2) / 3;
  Sum sums[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      sums[r][p] = kAnew ? Sum{} : load_as<Sum>(c + r * c_stride + p * kPanel);
    }
  }
  // A pointer for each three rows, whose addresses are then within what an instruction can add up.
  const uint8_t* threes[kThrees];
#pragma GCC unroll 4
  for (int g = 0; g < kThrees; ++g) {
    threes[g] = x + 3 * g * row_bytes;
  }
  for (const uint8_t* const end = w + 64 * steps; w != end; w += 64) {
    I weights[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      ahead.fetch(p * pitch);
      weights[p] = load_as<I>(w + p * pitch);
    }
    ahead.go_on();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const I value = splat_four(threes[r / 3] + r % 3 * row_bytes);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        sums[r][p] = Op::dot(sums[r][p], value, weights[p]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < kThrees; ++g) {
      threes[g] += 4;
      keep_apart(threes[g]);
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

template <class Op, bool kAnew = false, int R = kRowGroup, class Next>
inline void dot_group(int64_t rows, const uint8_t* x, int64_t row_bytes, const uint8_t* w,
                      int64_t pitch, int64_t panels, int64_t steps, Next ahead, int32_t* c,
                      int64_t c_stride) {
  if constexpr (R > 1) {
    if (rows < R) {
      dot_group<Op, kAnew, R - 1>(rows, x, row_bytes, w, pitch, panels, steps, ahead, c, c_stride);
      return;
    }
  }
  constexpr int P = panels_at_once_of(R);
  int64_t p = 0;
  const auto next = [&](auto count) {
    constexpr int N = decltype(count)::value;
    for (; p + N <= panels; p += N) {
      dot_tile<R, N, Op, kAnew>(x, row_bytes, w + p * pitch, pitch, steps, ahead.panel(p * pitch),
                                c + p * kPanel, c_stride);
    }
  };
  next(std::integral_constant<int, P>{});
  if constexpr (P > 2) {
    next(std::integral_constant<int, 2>{});
  }
  next(std::integral_constant<int, 1>{});
}

// What a group of rows fetches while it goes through `steps` steps of the panels at `now`: its part
// of those that all groups go through next, so that memory and products overlap. One group alone
// has what comes next in the panels it is in.
inline Ahead ahead_of(const RowGroups& groups, int64_t group, const uint8_t* now,
                      const uint8_t* next, int64_t steps) {
  if (groups.count == 1) {
    return {now + kAhead, 64};
  }
  return {next + 64 * steps / groups.count * group, 64 / groups.count};
}

// c begins with what the sums begin with.
template <class Op>
inline void dot_block(const BlockArgs& a) {
  const int64_t columns = a.panels * kPanel;
  const int64_t pitch = a.weight->panel_bytes;
  const int64_t all_steps = pitch / 64;
  const RowGroups groups(a.rows, kRowGroup);
  const int64_t at_once = panels_at_once_of(static_cast<int>(groups.most()));
  const auto* x = static_cast<const uint8_t*>(a.x);
  auto* c = reinterpret_cast<int32_t*>(a.c);
  for (int64_t p = 0; p < a.panels; p += at_once) {
    const int64_t panels = std::min(at_once, a.panels - p);
    for (int64_t i = 0; i < all_steps; i += kMostSteps) {
      const int64_t steps = std::min(kMostSteps, all_steps - i);
      const uint8_t* w = a.weight->panel(a.panel + p) + 64 * i;
      const uint8_t* next = i + steps < all_steps ? w + 64 * steps : w + at_once * pitch - 64 * i;
      for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t r = groups.begin(g);
        dot_group<Op>(groups.begin(g + 1) - r, x + r * a.row_bytes + 4 * i, a.row_bytes, w, pitch,
                      panels, steps, ahead_of(groups, g, w, next, steps),
                      c + r * columns + p * kPanel, columns);
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
constexpr int kInt4Rows = 6;
constexpr int int4_panels_at_once_of(int rows) { return rows <= 2 ? 1 : rows <= 3 ? 3 : 2; }

// c [R][P · 16] = x · P panels, whose multipliers are `groups` · 16 bytes apart.
template <int R, int P>
inline void dot_int4_tile(const uint8_t* x, int64_t row_bytes, const uint8_t* w, int64_t pitch,
                          const uint8_t* factors, const int32_t* group_sum, int64_t groups,
                          int64_t group, Ahead ahead, int32_t* c, int64_t c_stride) {
  constexpr int kThrees = (R + 2) / 3;
  I totals[R][P] = {};
  const uint8_t* threes[kThrees];
#pragma GCC unroll 4
  for (int i = 0; i < kThrees; ++i) {
    threes[i] = x + 3 * i * row_bytes;
  }
  for (int64_t g = 0; g < groups; ++g, factors += kPanel) {
    I sums[R][P];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        sums[r][p] = splat(-8 * group_sum[r * groups + g]);
      }
    }
    for (const uint8_t* const end = w + 8 * group; w != end; w += 64) {
      I low[P];
      I high[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        ahead.fetch(p * pitch);
        const I both = load_as<I>(w + p * pitch);
        low[p] = both & 0x0F0F0F0F;
        high[p] = (both >> 4) & 0x0F0F0F0F;
      }
      ahead.go_on();
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const uint8_t* const eight = threes[r / 3] + r % 3 * row_bytes;
        const I first = splat_four(eight);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          sums[r][p] = dot_bytes(sums[r][p], low[p], first);
        }
        const I second = splat_four(eight + 4);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          sums[r][p] = dot_bytes(sums[r][p], high[p], second);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kThrees; ++i) {
        threes[i] += 8;
        keep_apart(threes[i]);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const I factor = __builtin_convertvector(load_as<B>(factors + p * groups * kPanel), I);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        totals[r][p] += sums[r][p] * factor;
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      store_as(c + r * c_stride + p * kPanel, totals[r][p]);
    }
  }
}

// `panel` is the first of `panels`.
template <int R = kInt4Rows>
inline void dot_int4_group(const PackedWeight& weight, int64_t panel, int64_t panels, int64_t rows,
                           const uint8_t* x, int64_t row_bytes, const int32_t* group_sum,
                           Ahead ahead, int32_t* c, int64_t c_stride) {
  if constexpr (R > 1) {
    if (rows < R) {
      dot_int4_group<R - 1>(weight, panel, panels, rows, x, row_bytes, group_sum, ahead, c,
                            c_stride);
      return;
    }
  }
  constexpr int P = int4_panels_at_once_of(R);
  const int64_t groups = weight.groups();
  const int64_t pitch = weight.panel_bytes;
  int64_t p = 0;
  const auto next = [&](auto count) {
    constexpr int N = decltype(count)::value;
    for (; p + N <= panels; p += N) {
      dot_int4_tile<R, N>(x, row_bytes, weight.panel(panel + p), pitch,
                          weight.multiplier.data() + (panel + p) * groups * kPanel, group_sum,
                          groups, weight.group, ahead.panel(p * pitch), c + p * kPanel, c_stride);
    }
  };
  next(std::integral_constant<int, P>{});
  if constexpr (P > 2) {
    next(std::integral_constant<int, 2>{});
  }
  next(std::integral_constant<int, 1>{});
}

inline void dot_int4_block(const BlockArgs& a) {
  const PackedWeight& weight = *a.weight;
  const int64_t columns = a.panels * kPanel;
  const int64_t pitch = weight.panel_bytes;
  const int64_t steps = pitch / 64;
  const RowGroups groups(a.rows, kInt4Rows);
  const int64_t at_once = int4_panels_at_once_of(static_cast<int>(groups.most()));
  const auto* x = static_cast<const uint8_t*>(a.x);
  for (int64_t p = 0; p < a.panels; p += at_once) {
    const int64_t panels = std::min(at_once, a.panels - p);
    const uint8_t* w = weight.panel(a.panel + p);
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t r = groups.begin(g);
      dot_int4_group(weight, a.panel + p, panels, groups.begin(g + 1) - r, x + r * a.row_bytes,
                     a.row_bytes, a.group_sum + r * weight.groups(),
                     ahead_of(groups, g, w, w + at_once * pitch, steps),
                     reinterpret_cast<int32_t*>(a.c) + r * columns + p * kPanel, columns);
    }
  }
}
