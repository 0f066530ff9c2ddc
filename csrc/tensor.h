// Views of tensors that someone else owns, and the checks of what callers hand in.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

namespace qvlfast {

enum class DType { f32, bf16, f16, u8, s8, i32, i64 };

const char* dtype_name(DType dtype);
int64_t dtype_size(DType dtype);

// Strides count elements. Dimensions beyond `ndim` are 1.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t shape[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  // Where row i of the first dimension begins.
  void* row(int64_t i) const {
    return static_cast<char*>(data) + i * stride[0] * dtype_size(dtype);
  }
  std::string describe() const;  // "bf16 [3, 64]"
};

// Throws std::invalid_argument, which names the operand, unless `t` has this shape (-1: any), one
// of these dtypes, and no gaps between the values of its last dimension.
void require(const char* name, const TensorView& t, std::initializer_list<int64_t> shape,
             std::initializer_list<DType> dtypes);

// The same, and no two values in one place: for results, whose rows may be apart.
void require_distinct(const char* name, const TensorView& t, std::initializer_list<int64_t> shape,
                      std::initializer_list<DType> dtypes);

// The same as `require`, and no gaps at all.
void require_dense(const char* name, const TensorView& t, std::initializer_list<int64_t> shape,
                   std::initializer_list<DType> dtypes);

}  // namespace qvlfast
