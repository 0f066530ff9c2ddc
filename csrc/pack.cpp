#include "pack.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "bf16.h"
#include "parallel.h"
#include "scratch.h"

namespace qvlfast {
namespace {

// All of K of four panels of a small weight still make a task that is worth handing over.
constexpr int64_t kPanelsAtOnce = 4;

// Of a weight: beyond any memory, and far enough below 2^63 for everything computed from it here.
constexpr int64_t kMostValues = int64_t{1} << 48;
// 2^17 products of int8, of at most 128 · 127, add up to less than 2^31.
constexpr int64_t kMostInputs = int64_t{1} << 17;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Shape and storage of a packed weight whose parts have these shapes.
PackedWeight allocate(const std::vector<TensorView>& parts, Format format, int64_t group,
                      bool gated, int64_t k_unit, int64_t eighths_of_byte) {
  if (parts.empty()) {
    throw std::invalid_argument("a weight needs at least one part");
  }
  PackedWeight w;
  w.format = format;
  w.gated = gated;
  w.group = group;
  w.k = parts[0].shape[1] * (format == Format::int4 ? 2 : 1);
  for (const TensorView& part : parts) {
    if (part.ndim != 2 || part.shape[1] != parts[0].shape[1] || w.k == 0 || part.shape[0] == 0) {
      throw std::invalid_argument("a part of a weight is " + part.describe() + ", expected [N, " +
                                  std::to_string(parts[0].shape[1]) +
                                  "] with at least one row and one column");
    }
    if (part.shape[0] > kMostValues / w.k - w.n) {
      throw std::invalid_argument("a weight with a part " + part.describe() +
                                  " has more values than any memory");
    }
    w.n += part.shape[0];
  }
  if ((format == Format::int8 || format == Format::int4) && w.k > kMostInputs) {
    throw std::invalid_argument("a quantised weight has " + std::to_string(w.k) +
                                " inputs; sums of products in int32 hold " +
                                std::to_string(kMostInputs));
  }
  if (gated && (parts.size() != 2 || parts[0].shape[0] != parts[1].shape[0])) {
    throw std::invalid_argument("a gated weight has two parts of equal shape, gate and up");
  }
  w.k_padded = round_up(w.k, k_unit);
  w.panels = gated ? 2 * round_up(w.n / 2, kPanel) / kPanel : round_up(w.n, kPanel) / kPanel;
  w.panel_bytes = kPanel * w.k_padded * eighths_of_byte / 8;
  const int64_t bytes = w.panels * w.panel_bytes;
  auto* memory = static_cast<uint8_t*>(allocate_lines(bytes));
  w.data = {memory, [](uint8_t* p) { std::free(p); }};
  return w;
}

// Which part and row a channel is.
struct Place {
  size_t part;
  int64_t row;
};

Place locate(const std::vector<TensorView>& parts, int64_t channel) {
  size_t part = 0;
  while (channel >= parts[part].shape[0]) {
    channel -= parts[part].shape[0];
    ++part;
  }
  return {part, channel};
}

void for_each_panel(const PackedWeight& w, const std::function<void(int64_t)>& fn) {
  parallel_for(w.panels, kPanelsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      fn(i);
    }
  });
}

std::vector<TensorView> values_of(const std::vector<QuantisedPart>& parts, DType dtype) {
  std::vector<TensorView> values;
  for (const QuantisedPart& part : parts) {
    require("values of a weight", part.values, {-1, -1}, {dtype});
    require_dense("scale of a weight", part.scale, {part.values.shape[0]}, {DType::f32});
    values.push_back(part.values);
  }
  return values;
}

// Eight values of 4 bits, two to a byte as they lie in a row, in the order of a panel: the first
// four in the low halves of the bytes, the next four in the high halves.
uint32_t spread_halves(uint32_t pairs) {
  const auto apart = [](uint32_t two) { return (two & 0xFFU) | (two & 0xFF00U) << 8; };
  const uint32_t even = pairs & 0x0F0F0F0FU;
  const uint32_t odd = pairs >> 4 & 0x0F0F0F0FU;
  return apart(even) | apart(odd) << 8 | (apart(even >> 16) | apart(odd >> 16) << 8) << 4;
}

// Fills a panel, whose every word of four bytes holds 4 / `size` values of one channel, or eight
// where `size` is 0. `read(channel, first, count, out)` gives `count` values of a channel.
template <class Read>
void interleave(const PackedWeight& w, int64_t panel, int64_t size, const Read& read) {
  constexpr int64_t kWords = 64;  // of a channel at once: rows are far apart in memory
  const int64_t per_word = size == 0 ? 8 : 4 / size;
  const bool halves = w.format == Format::int4;
  uint32_t rows[kPanel][kWords];
  auto* out = reinterpret_cast<uint32_t*>(w.data.get() + panel * w.panel_bytes);
  for (int64_t first = 0; first < w.k_padded; first += kWords * per_word) {
    const int64_t words = std::min(kWords, (w.k_padded - first) / per_word);
    const int64_t count = std::clamp<int64_t>(w.k - first, 0, words * per_word);
    std::memset(rows, halves ? 0x88 : 0, sizeof rows);
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t channel = w.channel(panel * kPanel + c);
      if (channel >= 0 && count > 0) {
        read(channel, first, count, rows[c]);
      }
    }
    for (int64_t i = 0; i < words; ++i, out += kPanel) {
      for (int64_t c = 0; c < kPanel; ++c) {
        out[c] = halves ? spread_halves(rows[c][i]) : rows[c][i];
      }
    }
  }
}

// `count` values of a row from `first` on, as float32 or as bfloat16.
void copy_floats(const void* row, DType dtype, int64_t first, int64_t count, bool narrow,
                 void* out) {
  if (narrow ? dtype == DType::bf16 : dtype == DType::f32) {
    const int64_t size = dtype_size(dtype);
    std::memcpy(out, static_cast<const char*>(row) + first * size,
                static_cast<size_t>(count * size));
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    const float value = read_float(row, dtype, first + k);
    if (narrow) {
      static_cast<uint16_t*>(out)[k] = to_bf16(value);
    } else {
      static_cast<float*>(out)[k] = value;
    }
  }
}

// Values of a channel times their multipliers must be int8: some kernels widen them to it.
void require_int8(const uint8_t* pairs, const uint8_t* factors, int64_t k, int64_t group,
                  int64_t channel) {
  for (int64_t first = 0; first < k; first += group) {
    const int factor = factors[first / group];
    if (8 * factor <= 127) {
      continue;
    }
    int least = 15;
    int most = 0;
    for (int64_t i = first / 2; i < std::min(first + group, k) / 2; ++i) {
      least = std::min({least, pairs[i] & 15, pairs[i] >> 4});
      most = std::max({most, pairs[i] & 15, pairs[i] >> 4});
    }
    if ((8 - least) * factor > 127 || (most - 8) * factor > 127) {
      throw std::invalid_argument("channel " + std::to_string(channel) +
                                  " of a weight has values of " + std::to_string(least - 8) + ".." +
                                  std::to_string(most - 8) + " with a multiplier of " +
                                  std::to_string(factor) + "; products must lie in -127..127");
    }
  }
}

void copy_scales(PackedWeight& w, const std::vector<QuantisedPart>& parts,
                 const std::vector<TensorView>& values) {
  w.scale.assign(static_cast<size_t>(w.panels * kPanel), 0.0F);
  for (int64_t place = 0; place < w.panels * kPanel; ++place) {
    const int64_t channel = w.channel(place);
    if (channel >= 0) {
      const Place at = locate(values, channel);
      w.scale[static_cast<size_t>(place)] = parts[at.part].scale.as<float>()[at.row];
    }
  }
}

}  // namespace

const char* format_name(Format format) {
  switch (format) {
    case Format::f32:
      return "f32";
    case Format::bf16:
      return "bf16";
    case Format::int8:
      return "int8";
    case Format::int4:
      return "int4";
  }
  throw std::logic_error("this is a bug: a Format without a name");
}

int64_t PackedWeight::nbytes() const {
  return panels * panel_bytes + static_cast<int64_t>(multiplier.size()) +
         4 * static_cast<int64_t>(scale.size() + column_sum.size());
}

int64_t PackedWeight::channel(int64_t place) const {
  if (!gated) {
    return place < n ? place : -1;
  }
  const int64_t panel = place / kPanel;
  const int64_t within = panel / 2 * kPanel + place % kPanel;
  return within < n / 2 ? within + panel % 2 * (n / 2) : -1;
}

PackedWeight pack_floats(const std::vector<TensorView>& parts, Format format, bool gated) {
  if (format != Format::f32 && format != Format::bf16) {
    throw std::invalid_argument("floats are packed as f32 or bf16");
  }
  for (const TensorView& part : parts) {
    require("a part of a weight", part, {-1, -1}, {DType::f32, DType::bf16, DType::f16});
  }
  const bool narrow = format == Format::bf16;
  const int64_t size = narrow ? 2 : 4;
  PackedWeight w = allocate(parts, format, 0, gated, 32, narrow ? 16 : 32);
  for_each_panel(w, [&](int64_t panel) {
    interleave(w, panel, size, [&](int64_t channel, int64_t first, int64_t count, void* out) {
      const Place at = locate(parts, channel);
      const TensorView& part = parts[at.part];
      copy_floats(part.row(at.row), part.dtype, first, count, narrow, out);
    });
  });
  return w;
}

PackedWeight pack_int8(const std::vector<QuantisedPart>& parts, bool gated) {
  const std::vector<TensorView> values = values_of(parts, DType::s8);
  PackedWeight w = allocate(values, Format::int8, 0, gated, 64, 8);
  copy_scales(w, parts, values);
  w.column_sum.assign(static_cast<size_t>(w.panels * kPanel), 0);
  for_each_panel(w, [&](int64_t panel) {
    interleave(w, panel, 1, [&](int64_t channel, int64_t first, int64_t count, void* out) {
      const Place at = locate(values, channel);
      std::memcpy(out, values[at.part].as<int8_t>() + values[at.part].stride[0] * at.row + first,
                  static_cast<size_t>(count));
    });
    for (int64_t c = 0; c < kPanel; ++c) {
      const auto* column = reinterpret_cast<const int8_t*>(w.panel(panel)) + 4 * c;
      int32_t sum = 0;
      for (int64_t k = 0; k < w.k_padded; k += 4, column += 4 * kPanel) {
        sum += column[0] + column[1] + column[2] + column[3];
      }
      w.column_sum[static_cast<size_t>(panel * kPanel + c)] = sum;
    }
  });
  return w;
}

PackedWeight pack_int4(const std::vector<QuantisedPart>& parts, int64_t group, bool gated) {
  if (group != 32 && group != 64 && group != 128) {
    throw std::invalid_argument("group is " + std::to_string(group) + ", expected 32, 64 or 128");
  }
  const std::vector<TensorView> pairs = values_of(parts, DType::u8);
  PackedWeight w = allocate(pairs, Format::int4, group, gated, std::max<int64_t>(group, 64), 4);
  copy_scales(w, parts, pairs);
  const int64_t given = (w.k + group - 1) / group;
  for (const QuantisedPart& part : parts) {
    require_dense("multiplier of a weight", part.multiplier, {part.values.shape[0], given},
                  {DType::u8});
  }
  w.multiplier.assign(static_cast<size_t>(w.panels * w.groups() * kPanel), 1);
  for_each_panel(w, [&](int64_t panel) {
    // As many values of 4 bits to a word as four bytes hold; zero is 8.
    interleave(w, panel, 0, [&](int64_t channel, int64_t first, int64_t count, void* out) {
      const Place at = locate(pairs, channel);
      std::memcpy(out, pairs[at.part].as<uint8_t>() + pairs[at.part].stride[0] * at.row + first / 2,
                  static_cast<size_t>(count / 2));
    });
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t channel = w.channel(panel * kPanel + c);
      if (channel < 0) {
        continue;
      }
      const Place at = locate(pairs, channel);
      const auto* factors = static_cast<const uint8_t*>(parts[at.part].multiplier.row(at.row));
      require_int8(static_cast<const uint8_t*>(pairs[at.part].row(at.row)), factors, w.k, group,
                   channel);
      for (int64_t g = 0; g < given; ++g) {
        w.multiplier[static_cast<size_t>((panel * w.groups() + g) * kPanel + c)] = factors[g];
      }
    }
  });
  return w;
}

void unpack(const PackedWeight& w, float* out) {
  for_each_panel(w, [&](int64_t panel) {
    const uint8_t* data = w.panel(panel);
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t place = panel * kPanel + c;
      const int64_t channel = w.channel(place);
      if (channel < 0) {
        continue;
      }
      for (int64_t k = 0; k < w.k; ++k) {
        float value = 0.0F;
        switch (w.format) {
          case Format::f32:
            value = reinterpret_cast<const float*>(data)[k * kPanel + c];
            break;
          case Format::bf16:
            value = from_bf16(
                reinterpret_cast<const uint16_t*>(data)[(k / 2 * kPanel + c) * 2 + k % 2]);
            break;
          case Format::int8:
            value =
                static_cast<float>(static_cast<int8_t>(data[(k / 4 * kPanel + c) * 4 + k % 4])) *
                w.scale[static_cast<size_t>(place)];
            break;
          case Format::int4: {
            const uint8_t byte = data[(k / 8 * kPanel + c) * 4 + k % 4];
            const int q = (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
            const int64_t at = (panel * w.groups() + k / w.group) * kPanel + c;
            value = static_cast<float>(q * w.multiplier[static_cast<size_t>(at)]) *
                    w.scale[static_cast<size_t>(place)];
            break;
          }
        }
        out[channel * w.k + k] = value;
      }
    }
  });
}

}  // namespace qvlfast
