#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_pack.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace qvlfast {
namespace {

constexpr int64_t kTaskRows = 48;
// Keys are padded for the products that take the most at once.
constexpr int64_t kStep = 32;
// Segments are worked on in groups of about so many packed keys: what is packed for one stays in
// the caches until it is used, and little memory is needed for all.
constexpr int64_t kGroupPlaces = 8192;

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
    measure();
    const std::vector<Task> tasks = cut_tasks();
    mark_ancestors();
    const std::vector<Group> groups = place(tasks);
    int64_t most = 0;
    for (const Group& group : groups) {
      most = std::max(most, group.places);
    }
    places_ = shared_places_ + most;
    static thread_local Scratch key_memory;
    static thread_local Scratch value_memory;
    keys_ = static_cast<char*>(key_memory.get(key_heads_ * places_ * q_width_ * size_));
    values_ = static_cast<char*>(value_memory.get(key_heads_ * places_ * width_ * size_));
    pack(ancestors_, [&](int64_t s) { return Range{first_packed(s), full(s)}; });
    for (const Group& group : groups) {
      pack(group.segments, [&](int64_t s) { return own(s); });
      parallel_for(group.tasks * key_heads_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          attend(tasks[static_cast<size_t>(group.first_task + i % group.tasks)], i / group.tasks);
        }
      });
    }
  }

 private:
  // Of places in a sequence.
  struct Range {
    int64_t begin;
    int64_t end;
  };

  // Neighbouring segments whose queries are answered together.
  struct Group {
    std::vector<int64_t> segments;
    int64_t first_task;
    int64_t tasks;
    int64_t places;
  };

  void measure() {
    for (int64_t s = 0; s < forest_.segments; ++s) {
      const int32_t parent = forest_.parent[s];
      start_.push_back(parent < 0 ? 0 : end(parent));
      end_.push_back(start_.back() + forest_.cu_k[s + 1] - forest_.cu_k[s]);
    }
  }

  int64_t start(int64_t s) const { return start_[static_cast<size_t>(s)]; }
  int64_t end(int64_t s) const { return end_[static_cast<size_t>(s)]; }

  // A segment's keys are packed in whole blocks, cut at multiples of kKeyBlock from the beginning
  // of its sequence: a block that it shares with its ancestors is packed again for each of them,
  // so that a block is always one piece and sums go on in the same order. Those that follow it use
  // its full blocks, and it alone the one after these.
  int64_t first_packed(int64_t s) const { return start(s) / kKeyBlock * kKeyBlock; }
  int64_t full(int64_t s) const { return end(s) / kKeyBlock * kKeyBlock; }

  // The segments that are followed by any with queries.
  void mark_ancestors() {
    is_ancestor_.assign(static_cast<size_t>(forest_.segments), false);
    for (int64_t s = forest_.segments - 1; s >= 0; --s) {
      const auto at = static_cast<size_t>(s);
      if (forest_.parent[s] >= 0 && (is_ancestor_[at] || asked_[at])) {
        is_ancestor_[static_cast<size_t>(forest_.parent[s])] = true;
      }
    }
  }

  // Decides where keys are packed: full blocks of ancestors to stay, the others group by group in
  // the places behind those.
  std::vector<Group> place(const std::vector<Task>& tasks) {
    first_place_.assign(static_cast<size_t>(forest_.segments), 0);
    for (int64_t s = 0; s < forest_.segments; ++s) {
      if (is_ancestor_[static_cast<size_t>(s)]) {
        ancestors_.push_back(s);
        first_place_[static_cast<size_t>(s)] = shared_places_ - first_packed(s);
        shared_places_ += full(s) - first_packed(s);
      }
    }
    tail_place_ = first_place_;
    std::vector<Group> groups;
    for (size_t i = 0; i < tasks.size(); ++i) {
      const int64_t s = tasks[i].segment;
      const auto at = static_cast<size_t>(s);
      if (i == 0 || s != tasks[i - 1].segment) {
        const int64_t places = round_up(own(s).end - own(s).begin, kStep);
        if (groups.empty() || groups.back().places + places > kGroupPlaces) {
          groups.push_back({{}, static_cast<int64_t>(i), 0, 0});
        }
        tail_place_[at] = shared_places_ + groups.back().places - own(s).begin;
        if (!is_ancestor_[at]) {
          first_place_[at] = tail_place_[at];
        }
        groups.back().segments.push_back(s);
        groups.back().places += places;
      }
      ++groups.back().tasks;
    }
    return groups;
  }

  // What is packed of a segment for its own queries alone.
  Range own(int64_t s) const {
    return {is_ancestor_[static_cast<size_t>(s)] ? full(s) : first_packed(s), end(s)};
  }

  // Block `from`.. of a segment's sequence, among those that were packed for it.
  KeyBlock block_of(int64_t s, int64_t head, int64_t from) const {
    const auto at = static_cast<size_t>(s);
    const int64_t first = from < full(s) ? first_place_[at] : tail_place_[at];
    const int64_t place = head * places_ + first + from;
    return {keys_ + place * q_width_ * size_, values_ + place * width_ * size_,
            std::min(kKeyBlock, round_up(end(s) - from, kStep))};
  }

  template <typename RangeOf>
  void pack(const std::vector<int64_t>& segments, RangeOf range_of) {
    const auto count = static_cast<int64_t>(segments.size());
    parallel_for(count * key_heads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = segments[static_cast<size_t>(i / key_heads_)];
        const Range range = range_of(s);
        for (int64_t from = range.begin; from < range.end; from += kKeyBlock) {
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
      pack_half_keys(keys, used, block.count, dim_, q_width_, reinterpret_cast<uint32_t*>(to_keys));
      pack_half_values(values, used, block.count, dim_, width_,
                       reinterpret_cast<uint32_t*>(to_values));
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
      asked_.push_back(last > first);
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
  const int64_t shared_;       // query heads of a key head
  int64_t places_ = 0;         // of packed keys, for each key head
  int64_t shared_places_ = 0;  // the first of those, for ancestors
  char* keys_ = nullptr;
  char* values_ = nullptr;
  std::vector<int64_t> start_;  // of a segment, counted from the beginning of its sequence
  std::vector<int64_t> end_;
  std::vector<int64_t> first_query_;
  std::vector<bool> asked_;  // has queries that are wanted
  std::vector<bool> is_ancestor_;
  std::vector<int64_t> ancestors_;
  // Where the beginning of a segment's sequence would be packed, for its full blocks and the last.
  std::vector<int64_t> first_place_;
  std::vector<int64_t> tail_place_;
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
