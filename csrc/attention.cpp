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

constexpr int64_t kTaskRows = 48;
constexpr int64_t kMostHeadDim = 256;
// Keys are padded for the products that take the most at once.
constexpr int64_t kStep = 32;

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
        scale_(scale * 1.44269504088896341F),  // the kernels know powers of two
        read_(read),
        reads_(reads),
        out_(out),
        kernels_(kernels),
        operand_(kernels.attention_dtype(q.dtype)),
        size_(dtype_size(operand_)),
        dim_(q.shape[2]),
        q_width_(operand_ == DType::bf16 ? round_up(dim_, kernels.attention_step) : dim_),
        width_(round_up(dim_, kPanel)),
        key_heads_(k.shape[1]),
        shared_(q.shape[1] / k.shape[1]) {}

  void run() {
    place_segments();
    static thread_local Scratch key_memory;
    static thread_local Scratch value_memory;
    keys_ = static_cast<char*>(key_memory.get(key_heads_ * places_ * q_width_ * size_));
    values_ = static_cast<char*>(value_memory.get(key_heads_ * places_ * width_ * size_));
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
  // A segment's keys are packed in whole blocks, cut at multiples of kKeyBlock from the beginning
  // of its sequence: a block that it shares with its ancestors is packed again for each of them,
  // so that a block is always one piece and sums go on in the same order.
  void place_segments() {
    for (int64_t s = 0; s < forest_.segments; ++s) {
      const int32_t parent = forest_.parent[s];
      start_.push_back(parent < 0 ? 0 : end_[static_cast<size_t>(parent)]);
      end_.push_back(start_.back() + forest_.cu_k[s + 1] - forest_.cu_k[s]);
      first_place_.push_back(places_);
      places_ += round_up(end_.back() - first_packed(s), kStep);
    }
  }

  int64_t start(int64_t s) const { return start_[static_cast<size_t>(s)]; }
  int64_t end(int64_t s) const { return end_[static_cast<size_t>(s)]; }
  // Where the blocks that are packed for a segment begin in its sequence.
  int64_t first_packed(int64_t s) const { return start(s) / kKeyBlock * kKeyBlock; }

  // Block `from`.. of a segment's sequence, among those that were packed for it.
  KeyBlock block_of(int64_t s, int64_t head, int64_t from) const {
    const int64_t place =
        head * places_ + first_place_[static_cast<size_t>(s)] + from - first_packed(s);
    return {keys_ + place * q_width_ * size_, values_ + place * width_ * size_,
            std::min(kKeyBlock, round_up(end(s) - from, kStep))};
  }

  void pack() {
    parallel_for(forest_.segments * key_heads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = i / key_heads_;
        if (forest_.cu_k[s] == forest_.cu_k[s + 1]) {
          continue;
        }
        for (int64_t from = first_packed(s); from < this->end(s); from += kKeyBlock) {
          pack_block(s, i % key_heads_, from);
        }
      }
    });
  }

  void pack_block(int64_t s, int64_t head, int64_t from) {
    const KeyBlock block = block_of(s, head, from);
    const int64_t used = std::min(kKeyBlock, end(s) - from);
    const void* keys[kKeyBlock];
    const void* values[kKeyBlock];
    int64_t owner = s;
    for (int64_t j = used - 1; j >= 0; --j) {
      while (from + j < start(owner)) {
        owner = forest_.parent[owner];
      }
      const int64_t token = forest_.cu_k[owner] + from + j - start(owner);
      keys[j] = head_of(k_, token, head);
      values[j] = head_of(v_, token, head);
    }
    auto* to_keys = static_cast<char*>(const_cast<void*>(block.keys));
    auto* to_values = static_cast<char*>(const_cast<void*>(block.values));
    if (operand_ == DType::bf16) {
      pack_half_keys(keys, used, block.count, reinterpret_cast<uint32_t*>(to_keys));
      pack_half_values(values, used, block.count, reinterpret_cast<uint32_t*>(to_values));
    } else {
      pack_float_keys(keys, used, block.count, reinterpret_cast<float*>(to_keys));
      for (int64_t j = 0; j < block.count; ++j) {
        auto* row = reinterpret_cast<float*>(to_values) + j * width_;
        std::memset(row, 0, static_cast<size_t>(width_) * 4);
        if (j < used) {
          kernels_.widen(values[j], v_.dtype, dim_, row);
        }
      }
    }
  }

  void pack_float_keys(const void* const* keys, int64_t used, int64_t count, float* out) const {
    alignas(64) float wide[kMostHeadDim];
    for (int64_t j = 0; j < count; ++j) {
      float* column = out + j / kPanel * dim_ * kPanel + j % kPanel;
      if (j < used) {
        kernels_.widen(keys[j], k_.dtype, dim_, wide);
      } else {
        std::memset(wide, 0, static_cast<size_t>(dim_) * 4);
      }
      for (int64_t d = 0; d < dim_; ++d) {
        column[d * kPanel] = wide[d];
      }
    }
  }

  // Pairs of neighbouring values of a key lie together, as one 32-bit word.
  void pack_half_keys(const void* const* keys, int64_t used, int64_t count, uint32_t* out) const {
    const int64_t words = q_width_ / 2;
    alignas(64) uint16_t rows[kPanel][kMostHeadDim] = {};
    for (int64_t first = 0; first < count; first += kPanel, out += words * kPanel) {
      for (int64_t c = 0; c < kPanel; ++c) {
        if (first + c < used) {
          std::memcpy(rows[c], keys[first + c], static_cast<size_t>(dim_) * 2);
        } else {
          std::memset(rows[c], 0, static_cast<size_t>(dim_) * 2);
        }
      }
      for (int64_t w = 0; w < words; ++w) {
        for (int64_t c = 0; c < kPanel; ++c) {
          std::memcpy(out + w * kPanel + c, &rows[c][2 * w], 4);
        }
      }
    }
  }

  // Values of two neighbouring keys lie together, as one 32-bit word.
  void pack_half_values(const void* const* values, int64_t used, int64_t count,
                        uint32_t* out) const {
    alignas(64) uint16_t rows[2][kMostHeadDim] = {};
    for (int64_t j = 0; j < count; j += 2) {
      for (int64_t i = 0; i < 2; ++i) {
        if (j + i < used) {
          std::memcpy(rows[i], values[j + i], static_cast<size_t>(dim_) * 2);
        } else {
          std::memset(rows[i], 0, static_cast<size_t>(dim_) * 2);
        }
      }
      for (int64_t panel = 0; panel < width_ / kPanel; ++panel) {
        uint32_t* to = out + (panel * count / 2 + j / 2) * kPanel;
        for (int64_t c = 0; c < kPanel; ++c) {
          to[c] = rows[0][panel * kPanel + c] | static_cast<uint32_t>(rows[1][panel * kPanel + c])
                                                    << 16;
        }
      }
    }
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
    const int64_t token = read_ == nullptr ? query : read_[query];
    return causal_ ? end(s) - (forest_.cu_q[s + 1] - token) + 1 : end(s);
  }

  void attend(const Task& task, int64_t head) const {
    alignas(64) char q[kTaskRows * kMostHeadDim * 4];
    alignas(64) float accumulated[kTaskRows * kMostHeadDim];
    const int64_t padded_rows = round_up(task.rows, kPanel);
    std::memset(q, 0, static_cast<size_t>(padded_rows * q_width_ * size_));
    std::memset(accumulated, 0, static_cast<size_t>(padded_rows * width_) * 4);
    float most[kTaskRows];
    float sum[kTaskRows] = {};
    int64_t sees[kTaskRows];
    int64_t all = 0;
    const int64_t first_query = first_query_[static_cast<size_t>(task.segment)];
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t query = first_query + (task.first_row + r) / shared_;
      const int64_t q_head = head * shared_ + (task.first_row + r) % shared_;
      char* row = q + r * q_width_ * size_;
      if (operand_ == DType::bf16) {
        std::memcpy(row, head_of(q_, query, q_head), static_cast<size_t>(dim_) * 2);
      } else {
        kernels_.widen(head_of(q_, query, q_head), q_.dtype, dim_, reinterpret_cast<float*>(row));
      }
      most[r] = -std::numeric_limits<float>::infinity();
      sees[r] = visible(task.segment, query);
      all = std::max(all, sees[r]);
    }
    const AttentionArgs args{operand_,    q,      q_width_, task.rows, scale_,
                             accumulated, width_, most,     sum};
    const std::vector<int64_t> chain = chain_of(task.segment);
    size_t at = 0;  // the segment for which the block was packed: the one with its last key
    int64_t in_block[kTaskRows];
    for (int64_t from = 0; from < all; from += kKeyBlock) {
      while (chain[at] != task.segment && end(chain[at]) < from + kKeyBlock) {
        ++at;
      }
      for (int64_t r = 0; r < task.rows; ++r) {
        in_block[r] = std::clamp<int64_t>(sees[r] - from, 0, kKeyBlock);
      }
      kernels_.attend(args, block_of(chain[at], head, from), in_block);
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

  // The segment after its ancestors.
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
  const float scale_;
  const int64_t* read_;
  const int64_t reads_;
  const TensorView& out_;
  const Kernels& kernels_;
  const DType operand_;
  const int64_t size_;  // bytes of an operand
  const int64_t dim_;
  const int64_t q_width_;  // of a row of queries and of a key
  const int64_t width_;    // of a row of values
  const int64_t key_heads_;
  const int64_t shared_;  // query heads of a key head
  int64_t places_ = 0;    // of packed keys, for each key head
  char* keys_ = nullptr;
  char* values_ = nullptr;
  std::vector<int64_t> start_;  // of a segment, counted from the beginning of its sequence
  std::vector<int64_t> end_;
  std::vector<int64_t> first_place_;
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
  if (!(scale > 0.0F)) {
    throw std::invalid_argument("scale is " + std::to_string(scale) + ", expected above 0");
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
