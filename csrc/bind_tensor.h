// Python tensors: a DLPack capsule, or anything with __dlpack__; None is a view without data. The
// capsule is kept for the call and not consumed.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "tensor.h"

namespace qvlfast {

// The part of DLPack that is used: https://dmlc.github.io/dlpack/latest/c_api.html
struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// A view with what owns its memory: the elements of a list outlive their casters. To be copied with
// the GIL held alone; as a TensorView it may be copied at any time.
struct Tensor : TensorView {
  pybind11::object capsule;
};

inline DType dtype_of(const DlTensor& t) {
  constexpr uint8_t kInt = 0;
  constexpr uint8_t kUInt = 1;
  constexpr uint8_t kFloat = 2;
  constexpr uint8_t kBfloat = 4;
  const struct {
    uint8_t code, bits;
    DType dtype;
  } known[] = {{kFloat, 32, DType::f32}, {kBfloat, 16, DType::bf16}, {kFloat, 16, DType::f16},
               {kUInt, 8, DType::u8},    {kInt, 8, DType::s8},       {kInt, 32, DType::i32},
               {kInt, 64, DType::i64}};
  for (const auto& k : known) {
    if (t.code == k.code && t.bits == k.bits && t.lanes == 1) {
      return k.dtype;
    }
  }
  throw pybind11::type_error("a tensor has a dtype that no kernel takes (DLPack code " +
                             std::to_string(t.code) + ", " + std::to_string(t.bits) + " bits)");
}

}  // namespace qvlfast

namespace pybind11 {
namespace detail {

template <>
struct type_caster<qvlfast::Tensor> {
  PYBIND11_TYPE_CASTER(qvlfast::Tensor, const_name("Tensor"));

  bool load(handle source, bool) {
    value = qvlfast::Tensor{};
    if (source.is_none()) {
      return true;
    }
    if (PyCapsule_IsValid(source.ptr(), "dltensor") != 0) {
      value.capsule = reinterpret_borrow<object>(source);
    } else if (hasattr(source, "__dlpack__")) {
      value.capsule = source.attr("__dlpack__")();
    } else {
      return false;
    }
    const auto* t = static_cast<const qvlfast::DlTensor*>(
        PyCapsule_GetPointer(value.capsule.ptr(), "dltensor"));
    if (t == nullptr) {
      throw error_already_set();
    }
    constexpr int32_t kCpu = 1;
    if (t->device_type != kCpu || t->ndim > 4) {
      throw type_error("a tensor is on another device than the CPU, or has more than 4 dimensions");
    }
    value.dtype = qvlfast::dtype_of(*t);
    value.data = static_cast<char*>(t->data) + t->byte_offset;
    value.ndim = t->ndim;
    int64_t dense = 1;
    for (int i = t->ndim - 1; i >= 0; --i) {
      value.shape[i] = t->shape[i];
      value.stride[i] = t->strides == nullptr ? dense : t->strides[i];
      dense *= t->shape[i];
    }
    if (value.data == nullptr) {
      static char nothing;
      value.data = &nothing;  // of an empty tensor: not None
    }
    return true;
  }
};

}  // namespace detail
}  // namespace pybind11
