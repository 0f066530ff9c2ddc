// Weights in the layout that the products read, made once, when a model is loaded.
//
// Output channels come in panels of 16, so that a panel's values for one step along K are one
// cache line or a part of one, and neighbours for every instruction set:
//   f32   [panel][K][16]
//   bf16  [panel][K / 2][16][2]
//   int8  [panel][K / 4][16][4]
//   int4  [panel][K / 8][16][4] bytes: the low half has the first four inputs, the high half the
//         next four, as value + 8; and a multiplier for each [panel][group][16]
// Channels are padded to whole panels and K to `k_padded`, with zeros. In a gated weight panels of
// the gate and of the up projection take turns.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tensor.h"

namespace qvlfast {

constexpr int64_t kPanel = 16;

enum class Format { f32, bf16, int8, int4 };

const char* format_name(Format format);

struct PackedWeight {
  Format format = Format::f32;
  int64_t n = 0;  // output channels; for gated weights those of both parts
  int64_t k = 0;
  int64_t k_padded = 0;
  int64_t panels = 0;
  int64_t panel_bytes = 0;
  int64_t group = 0;  // int4: inputs that share a multiplier
  bool gated = false;
  std::unique_ptr<uint8_t[], void (*)(uint8_t*)> data{nullptr, [](uint8_t*) {}};
  std::vector<float> scale;         // [panels · 16], of int8 and int4
  std::vector<int32_t> column_sum;  // [panels · 16], of int8: Σ over K
  std::vector<uint8_t> multiplier;  // [panels][groups][16], of int4

  int64_t groups() const { return group == 0 ? 0 : k_padded / group; }
  const uint8_t* panel(int64_t i) const { return data.get() + i * panel_bytes; }
  int64_t nbytes() const;
  // The channel, counted along the parts as they were given, at a place among the panels; -1 for
  // padding.
  int64_t channel(int64_t place) const;
};

// A part of an int8 weight, values [N, K] int8 in -127..127 with scale [N]; or of an int4 weight,
// values [N, K / 2] uint8, each two values + 8 with the first in the low half, and multiplier
// [N, ceil(K / group)] uint8 besides, where each value times its multiplier is in -127..127.
struct QuantisedPart {
  TensorView values;
  TensorView multiplier;
  TensorView scale;
};

// Parts [N_i, K] are put below each other; a gated weight has two of equal shape, gate and up.
// All throw std::invalid_argument for parts that do not fit, among them int8 and int4 weights of
// more than 2^17 inputs, whose sums would not be int32.
PackedWeight pack_floats(const std::vector<TensorView>& parts, Format format, bool gated);
PackedWeight pack_int8(const std::vector<QuantisedPart>& parts, bool gated);
PackedWeight pack_int4(const std::vector<QuantisedPart>& parts, int64_t group, bool gated);

// What a weight stands for: float32 [n, k], parts below each other.
void unpack(const PackedWeight& weight, float* out);

}  // namespace qvlfast
