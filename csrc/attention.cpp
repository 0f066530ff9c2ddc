#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace qvlfast {
namespace {

constexpr int64_t kTaskRows = 24;
constexpr int64_t kMostHeadDim = 256;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

const void* head_of(const TensorView& t, int64_t token, int64_t head) {
  return static_cast<char*>(t.row(token)) + head * t.stride[1] * dtype_size(t.dtype);
}

// A block of rows of one segment and one key head. Rows are queries times the query heads that
// share the key head.
struct Task {
  int64_t segment;
  int64_t first_row;
  int64_t rows;
};

class Attention {
 public:
  Attention(const TensorView& q, const TensorView& k, const TensorView& v,
            const SegmentForest& forest, bool causal, float scale, const int64_t* read,
            int64_t reads, const TensorView& out, const Kernels& kernels)
      : q_(q),
        k_(k),
        v_(v),
        forest_(forest),
        causal_(causal),
        scale_(scale * 1.44269504088896341F),
        read_(read),
        reads_(reads),
        out_(out),
        kernels_(kernels),
        dim_(q.shape[2]),
        width_(round_up(dim_, kPanel)),
        key_heads_(k.shape[1]),
        shared_(q.shape[1] / k.shape[1]) {}

  void run() {
    place_segments();
    static thread_local Scratch key_memory;
    static thread_local Scratch value_memory;
    keys_ = static_cast<float*>(key_memory.get(4 * key_heads_ * panels_ * dim_ * kPanel));
    values_ = static_cast<float*>(value_memory.get(4 * key_heads_ * k_.shape[0] * width_));
    pack();
    const std::vector<Task> tasks = cut_tasks();
    const auto count = static_cast<int64_t>(tasks.size());
    parallel_for(count * key_heads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        attend(tasks[static_cast<size_t>(i % count)], i / count);
      }
    });
  }

 private:
  // Where each segment begins, counted from the beginning of its sequence, and its first panel.
  void place_segments() {
    const auto count = static_cast<size_t>(forest_.segments);
    start_.resize(count);
    first_panel_.resize(count);
    for (size_t s = 0; s < count; ++s) {
      const int32_t parent = forest_.parent[s];
      start_[s] = parent < 0 ? 0 : start_[static_cast<size_t>(parent)] + keys_of(parent);
      first_panel_[s] = panels_;
      const int64_t end = start_[s] + keys_of(static_cast<int64_t>(s));
      panels_ += round_up(end, kPanel) / kPanel - start_[s] / kPanel;
    }
  }

  int64_t keys_of(int64_t s) const { return forest_.cu_k[s + 1] - forest_.cu_k[s]; }

  // Each key and value once: keys as panels [D][16] on a grid that counts from the beginning of the
  // sequence, values as rows [width]; both for each key head.
  void pack() {
    parallel_for(forest_.segments * key_heads_, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float wide[kMostHeadDim];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = i / key_heads_;
        const int64_t head = i % key_heads_;
        const int64_t count = keys_of(s);
        if (count == 0) {
          continue;
        }
        const int64_t skip = start_[static_cast<size_t>(s)] % kPanel;
        float* panels =
            keys_ + (head * panels_ + first_panel_[static_cast<size_t>(s)]) * dim_ * kPanel;
        const int64_t used = round_up(skip + count, kPanel) / kPanel;
        // Columns that are none of the segment's own are computed and not used.
        std::memset(panels, 0, static_cast<size_t>(dim_ * kPanel) * 4);
        std::memset(panels + (used - 1) * dim_ * kPanel, 0, static_cast<size_t>(dim_ * kPanel) * 4);
        for (int64_t j = 0; j < count; ++j) {
          const int64_t token = forest_.cu_k[s] + j;
          kernels_.widen(head_of(k_, token, head), k_.dtype, dim_, wide);
          float* column = panels + (skip + j) / kPanel * dim_ * kPanel + (skip + j) % kPanel;
          for (int64_t d = 0; d < dim_; ++d) {
            column[d * kPanel] = wide[d];
          }
          float* value = values_ + (head * k_.shape[0] + token) * width_;
          kernels_.widen(head_of(v_, token, head), v_.dtype, dim_, value);
          std::memset(value + dim_, 0, static_cast<size_t>(width_ - dim_) * 4);
        }
      }
    });
  }

  std::vector<Task> cut_tasks() {
    std::vector<Task> tasks;
    first_query_.resize(static_cast<size_t>(forest_.segments));
    for (int64_t s = 0; s < forest_.segments; ++s) {
      int64_t first = forest_.cu_q[s];
      int64_t last = forest_.cu_q[s + 1];
      if (read_ != nullptr) {
        first = std::lower_bound(read_, read_ + reads_, first) - read_;
        last = std::lower_bound(read_, read_ + reads_, last) - read_;
      }
      first_query_[static_cast<size_t>(s)] = first;
      const int64_t rows = (last - first) * shared_;
      for (int64_t row = 0; row < rows; row += kTaskRows) {
        tasks.push_back({s, row, std::min(kTaskRows, rows - row)});
      }
    }
    return tasks;
  }

  // How many keys of its sequence a query sees, by its row among q.
  int64_t visible(int64_t s, int64_t query) const {
    const int64_t end = start_[static_cast<size_t>(s)] + keys_of(s);
    const int64_t token = read_ == nullptr ? query : read_[query];
    return causal_ ? end - (forest_.cu_q[s + 1] - token) + 1 : end;
  }

  void attend(const Task& task, int64_t head) const {
    alignas(64) float q[kTaskRows * kMostHeadDim];
    alignas(64) float accumulated[kTaskRows * kMostHeadDim] = {};
    float most[kTaskRows];
    float sum[kTaskRows] = {};
    int64_t sees[kTaskRows];
    int64_t all = 0;
    const int64_t first_query = first_query_[static_cast<size_t>(task.segment)];
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t query = first_query + (task.first_row + r) / shared_;
      const int64_t q_head = head * shared_ + (task.first_row + r) % shared_;
      kernels_.widen(head_of(q_, query, q_head), q_.dtype, dim_, q + r * dim_);
      for (int64_t d = 0; d < dim_; ++d) {
        q[r * dim_ + d] *= scale_;
      }
      most[r] = -std::numeric_limits<float>::infinity();
      sees[r] = visible(task.segment, query);
      all = std::max(all, sees[r]);
    }
    const AttentionArgs args{q, task.rows, dim_, accumulated, most, sum};
    const std::vector<int64_t> chain = chain_of(task.segment);
    std::vector<KeyPiece> pieces;
    int64_t in_block[kTaskRows];
    for (int64_t block = 0; block < all; block += kKeyBlock) {
      const int64_t block_end = std::min(block + kKeyBlock, all);
      pieces.clear();
      for (const int64_t s : chain) {
        const int64_t start = start_[static_cast<size_t>(s)];
        const int64_t low = std::max(start, block);
        const int64_t high = std::min(start + keys_of(s), block_end);
        if (low < high) {
          const int64_t panel =
              first_panel_[static_cast<size_t>(s)] + low / kPanel - start / kPanel;
          const int64_t token = forest_.cu_k[s] + low - start;
          pieces.push_back({keys_ + (head * panels_ + panel) * dim_ * kPanel,
                            values_ + (head * k_.shape[0] + token) * width_, low % kPanel,
                            high - low});
        }
      }
      for (int64_t r = 0; r < task.rows; ++r) {
        in_block[r] = std::clamp<int64_t>(sees[r] - block, 0, kKeyBlock);
      }
      kernels_.attend(args, pieces.data(), static_cast<int64_t>(pieces.size()), in_block);
    }
    kernels_.attend_end(args);
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t query = first_query + (task.first_row + r) / shared_;
      const int64_t q_head = head * shared_ + (task.first_row + r) % shared_;
      void* to = static_cast<char*>(out_.data) +
                 (query * q_.shape[1] + q_head) * dim_ * dtype_size(out_.dtype);
      kernels_.narrow(accumulated + r * width_, dim_, out_.dtype, to);
    }
  }

  std::vector<int64_t> chain_of(int64_t segment) const {
    std::vector<int64_t> chain;
    for (int64_t s = segment; s >= 0; s = forest_.parent[s]) {
      chain.push_back(s);
    }
    std::reverse(chain.begin(), chain.end());
    return chain;
  }

  const TensorView& q_;
  const TensorView& k_;
  const TensorView& v_;
  const SegmentForest& forest_;
  const bool causal_;
  const float scale_;  // by log2(e), since the kernels know powers of two
  const int64_t* read_;
  const int64_t reads_;
  const TensorView& out_;
  const Kernels& kernels_;
  const int64_t dim_;
  const int64_t width_;  // of a row of values: D in whole panels
  const int64_t key_heads_;
  const int64_t shared_;  // query heads of a key head
  int64_t panels_ = 0;
  float* keys_ = nullptr;
  float* values_ = nullptr;
  std::vector<int64_t> start_;
  std::vector<int64_t> first_panel_;
  std::vector<int64_t> first_query_;
};

void check_forest(const SegmentForest& f) {
  bool fits = f.cu_q[0] == 0 && f.cu_k[0] == 0;
  for (int64_t s = 0; fits && s < f.segments; ++s) {
    const int64_t queries = f.cu_q[s + 1] - f.cu_q[s];
    const int64_t keys = f.cu_k[s + 1] - f.cu_k[s];
    fits = queries >= 0 && keys >= queries && f.parent[s] >= -1 && f.parent[s] < s;
  }
  if (!fits) {
    throw std::invalid_argument(
        "cu_q and cu_k must start at 0, never fall and leave keys >= queries; a parent is -1 or an "
        "earlier segment");
  }
}

}  // namespace

void attention(const TensorView& q, const TensorView& k, const TensorView& v,
               const SegmentForest& forest, bool causal, float scale, const int64_t* read,
               int64_t reads, const TensorView& out, Isa isa) {
  check_forest(forest);
  const int64_t queries = forest.cu_q[forest.segments];
  const int64_t keys = forest.cu_k[forest.segments];
  require("q", q, {read == nullptr ? queries : reads, -1, -1}, {DType::f32, DType::bf16});
  require("k", k, {keys, -1, q.shape[2]}, {q.dtype});
  require("v", v, {keys, k.shape[1], q.shape[2]}, {q.dtype});
  require_dense("out", out, {q.shape[0], q.shape[1], q.shape[2]}, {q.dtype});
  if (q.shape[2] < 1 || q.shape[2] > kMostHeadDim || k.shape[1] < 1 ||
      q.shape[1] % k.shape[1] != 0) {
    throw std::invalid_argument("q is " + q.describe() + " and k " + k.describe() +
                                "; heads have 1 to 256 values, and query heads are a multiple of "
                                "key heads");
  }
  for (int64_t i = 0; read != nullptr && i < reads; ++i) {
    if (read[i] < 0 || read[i] >= queries || (i > 0 && read[i] <= read[i - 1])) {
      throw std::invalid_argument("read must rise and lie in 0 .. " + std::to_string(queries - 1));
    }
  }
  if (q.shape[0] == 0) {
    return;
  }
  Attention(q, k, v, forest, causal, scale, read, reads, out, kernels(isa)).run();
}

}  // namespace qvlfast
