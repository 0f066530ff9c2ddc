// Single values of the narrow float types.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "tensor.h"

namespace qvlfast {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

// Rounds to nearest, ties to even.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) {
    return static_cast<uint16_t>((bits >> 16) | 0x40U);
  }
  return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t magnitude = half & 0x7FFFU;
  if (magnitude >= 0x7C00U) {  // infinity or NaN
    return bits_to_float(sign | 0x7F800000U | ((magnitude & 0x3FFU) << 13));
  }
  // Multiplying by 2^112 moves the exponent over, of values below the normal ones as well.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000U);
  return bits_to_float(float_to_bits(scaled) | sign);
}

inline float read_float(const void* row, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(row)[i];
    case DType::bf16:
      return from_bf16(static_cast<const uint16_t*>(row)[i]);
    case DType::f16:
      return from_f16(static_cast<const uint16_t*>(row)[i]);
    default:
      throw std::logic_error("this is a bug: not a float dtype");
  }
}

}  // namespace qvlfast
