// One block of keys of attention with an online softmax. Included after gemm.inl, in the same
// namespace.

constexpr int64_t kScoreRows = 24;

// Scores of all rows by the block's keys, [rows][kKeyBlock].
inline void score_block(const AttentionArgs& a, const KeyPiece* pieces, int64_t piece_count,
                        float* scores) {
  const int64_t step = kPanel * 4;
  const int64_t pitch = a.head_dim * step;
  int64_t column = 0;  // of the piece's first panel
  for (int64_t i = 0; i < piece_count; ++i) {
    const KeyPiece& piece = pieces[i];
    const auto* w = reinterpret_cast<const uint8_t*>(piece.keys);
    const int64_t panels = (piece.skip + piece.count + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < panels; ++p, w += pitch) {
      alignas(64) float part[kScoreRows * kPanel] = {};
      // A panel that begins within one of the piece before: only its own columns are new.
      const int64_t skip = p == 0 ? piece.skip : 0;
      for (int64_t r = 0; r < a.rows; r += kRowGroup) {
        float_group<float>(std::min<int64_t>(kRowGroup, a.rows - r), a.q + r * a.head_dim,
                           a.head_dim, w, pitch, step, 1, a.head_dim, part + r * kPanel, kPanel);
      }
      float* out = scores + column + p * kPanel;
      for (int64_t r = 0; r < a.rows; ++r) {
        std::memcpy(out + r * kKeyBlock + skip, part + r * kPanel + skip,
                    static_cast<size_t>(kPanel - skip) * 4);
      }
    }
    const int64_t end = column + piece.skip + piece.count;
    column = end / kPanel * kPanel;
  }
}

// Scores of a row become exp2(score - maximum); what came before is scaled to the new maximum.
inline void softmax_row(float* scores, int64_t visible, int64_t padded, float* most, float* sum,
                        float* accumulated, int64_t width) {
  const float nothing = -std::numeric_limits<float>::infinity();
  for (int64_t j = visible; j < padded; ++j) {
    scores[j] = nothing;
  }
  F largest = splat(nothing);
  for (int64_t j = 0; j < padded; j += kLanes) {
    largest = max(load(scores + j), largest);
  }
  const float found = most_of(largest);
  const float before = *most;
  const float now = found > before ? found : before;
  if (visible == 0 || now == nothing) {
    std::memset(scores, 0, static_cast<size_t>(padded) * 4);
    return;
  }
  F total = F{};
  const F shift = splat(now);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const F p = exp2_of(load(scores + j) - shift);
    store(scores + j, p);
    total += p;
  }
  if (now > before) {
    const F factor = exp2_of(splat(before) - shift);
    for (int64_t d = 0; d < width; d += kLanes) {
      store(accumulated + d, load(accumulated + d) * factor);
    }
    *sum *= factor[0];
    *most = now;
  }
  *sum += sum_of(total);
}

inline void attend(const AttentionArgs& a, const KeyPiece* pieces, int64_t piece_count,
                   const int64_t* visible) {
  alignas(64) float scores[kScoreRows * kKeyBlock];
  const int64_t width = (a.head_dim + kPanel - 1) / kPanel * kPanel;
  score_block(a, pieces, piece_count, scores);
  for (int64_t r = 0; r < a.rows; r += kRowGroup) {
    const int64_t rows = std::min<int64_t>(kRowGroup, a.rows - r);
    int64_t keys = 0;
    for (int64_t i = r; i < r + rows; ++i) {
      keys = std::max(keys, visible[i]);
    }
    const int64_t padded = (keys + kPanel - 1) / kPanel * kPanel;
    for (int64_t i = r; i < r + rows; ++i) {
      softmax_row(scores + i * kKeyBlock, visible[i], padded, a.most + i, a.sum + i,
                  a.accumulated + i * width, width);
    }
    int64_t column = 0;
    for (int64_t i = 0; i < piece_count && column < keys; ++i) {
      const int64_t count = std::min(pieces[i].count, keys - column);
      float_group<float>(rows, scores + r * kKeyBlock + column, kKeyBlock,
                         reinterpret_cast<const uint8_t*>(pieces[i].values), kPanel * 4, width * 4,
                         width / kPanel, count, a.accumulated + r * width, width);
      column += pieces[i].count;
    }
  }
}

inline void attend_end(const AttentionArgs& a) {
  const int64_t width = (a.head_dim + kPanel - 1) / kPanel * kPanel;
  for (int64_t r = 0; r < a.rows; ++r) {
    const float factor = 1.0F / a.sum[r];
    for (int64_t d = 0; d < width; d += kLanes) {
      store(a.accumulated + r * width + d, load(a.accumulated + r * width + d) * factor);
    }
  }
}
