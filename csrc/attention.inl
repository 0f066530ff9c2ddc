// One block of keys of attention with an online softmax. Included after gemm.inl, in the same
// namespace.

// Row i of scores sees `visible` keys; the rest up to `padded` become minus infinity. The largest
// of them and of `before`, NaN left out.
inline float largest_score(float* scores, int64_t visible, int64_t padded, float before) {
  const float nothing = -std::numeric_limits<float>::infinity();
  for (int64_t j = visible; j < padded; ++j) {
    scores[j] = nothing;
  }
  F largest = splat(nothing);
  for (int64_t j = 0; j < padded; j += kLanes) {
    largest = max(load(scores + j), largest);
  }
  const float found = most_of(largest);
  return found > before ? found : before;
}

// What was summed up with the maximum `before`, scaled to the maximum `now`.
inline void rescale(const AttentionArgs& a, int64_t row, float now) {
  const F factor = exp2_of(splat(a.scale * (a.most[row] - now)));
  float* accumulated = a.accumulated + row * a.width;
  for (int64_t d = 0; d < a.width; d += kLanes) {
    store(accumulated + d, load(accumulated + d) * factor);
  }
  a.sum[row] *= factor[0];
  a.most[row] = now;
}

// Operands in float32.
struct FloatAttention {
  using Weight = float;

  static constexpr int64_t kRows = kRowGroup;
  static constexpr int64_t kKeys = kPanel;  // padded to a multiple of this

  static void score(const AttentionArgs& a, const KeyBlock& block, int64_t row, int64_t rows,
                    int64_t keys, float* scores) {
    constexpr int64_t kStep = kPanel * 4;
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(scores + r * kKeyBlock, 0, static_cast<size_t>(keys) * 4);
    }
    float_group<float>(rows, static_cast<const float*>(a.q) + row * a.q_width, a.q_width,
                       static_cast<const uint8_t*>(block.keys), a.q_width * kStep, kStep,
                       keys / kPanel, a.q_width, scores, kKeyBlock);
  }

  // 2^(scale · (score - most)) in place of the scores; their sum.
  static float weigh(float* scores, int64_t keys, float scale, float most, float* weights) {
    F total = F{};
    for (int64_t j = 0; j < keys; j += kLanes) {
      const F p = exp2_of((load(scores + j) - most) * scale);
      store(weights + j, p);
      total += p;
    }
    return sum_of(total);
  }

  static void add_values(const AttentionArgs& a, const KeyBlock& block, int64_t row, int64_t rows,
                         int64_t keys, const float* weights) {
    float_group<float>(rows, weights, kKeyBlock, static_cast<const uint8_t*>(block.values),
                       kPanel * 4, a.width * 4, a.width / kPanel, keys,
                       a.accumulated + row * a.width, a.width);
  }
};

template <class Form>
inline void attend_with(const AttentionArgs& a, const KeyBlock& block, const int64_t* visible) {
  constexpr int64_t kRows = Form::kRows;
  alignas(64) float scores[kRows * kKeyBlock];
  alignas(64) typename Form::Weight weights[kRows * kKeyBlock];
  for (int64_t row = 0; row < a.rows; row += kRows) {
    const int64_t rows = std::min(kRows, a.rows - row);
    const int64_t seen = *std::max_element(visible + row, visible + row + rows);
    if (seen == 0) {
      continue;
    }
    const int64_t keys = (seen + Form::kKeys - 1) / Form::kKeys * Form::kKeys;
    Form::score(a, block, row, rows, keys, scores);
    // The maxima of all rows first: each takes a while to come out of its vector.
    float now[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      now[r] = largest_score(scores + r * kKeyBlock, visible[row + r], keys, a.most[row + r]);
      if (now[r] > a.most[row + r]) {
        rescale(a, row + r, now[r]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      // Without a maximum, scores are minus infinity, whose weight is 0, or NaN, which stays.
      const bool none = now[r] == -std::numeric_limits<float>::infinity();
      a.sum[row + r] += Form::weigh(scores + r * kKeyBlock, keys, a.scale, none ? 0.0F : now[r],
                                    weights + r * kKeyBlock);
    }
    // Products may take 16 rows at a time.
    for (int64_t r = rows; r < std::min(kRows, (rows + 15) / 16 * 16); ++r) {
      std::memset(weights + r * kKeyBlock, 0, static_cast<size_t>(keys) * sizeof *weights);
    }
    Form::add_values(a, block, row, rows, keys, weights);
  }
}

inline void attend_float(const AttentionArgs& a, const KeyBlock& block, const int64_t* visible) {
  attend_with<FloatAttention>(a, block, visible);
}

inline DType float_attention(DType) { return DType::f32; }

inline void attend_end(const AttentionArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const float factor = 1.0F / a.sum[r];
    for (int64_t d = 0; d < a.width; d += kLanes) {
      store(a.accumulated + r * a.width + d, load(a.accumulated + r * a.width + d) * factor);
    }
  }
}
