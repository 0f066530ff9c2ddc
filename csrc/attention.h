// Attention over a forest of segments.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "tensor.h"

namespace qvlfast {

// S segments: segment s owns the keys cu_k[s] .. cu_k[s + 1] and the queries cu_q[s] .. cu_q[s +
// 1], which are its last tokens; parent[s] is an earlier segment or -1.
struct SegmentForest {
  const int32_t* cu_q = nullptr;
  const int32_t* cu_k = nullptr;
  const int32_t* parent = nullptr;
  int64_t segments = 0;
};

// softmax(scale · q kᵀ) v, each token over its ancestors' tokens and its own segment's: all of
// them, or with `causal` those up to itself.
//
// q, out [cu_q[S], Hq, D], or [reads, Hq, D] where `read` [reads] rising indices of queries are
// wanted alone; k, v [cu_k[S], Hk, D]; D at most 256 and Hq a multiple of Hk. float32 or bfloat16.
// q, k and v may be views into wider tensors; out is dense. The same tokens give the same bits,
// however they are cut into segments, and whatever else is in the forest.
// Throws std::invalid_argument for operands that do not fit.
void attention(const TensorView& q, const TensorView& k, const TensorView& v,
               const SegmentForest& forest, bool causal, float scale, const int64_t* read,
               int64_t reads, const TensorView& out, Isa isa);

}  // namespace qvlfast
