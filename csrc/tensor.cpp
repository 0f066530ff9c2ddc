#include "tensor.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace qvlfast {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::u8:
      return "uint8";
    case DType::s8:
      return "int8";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
  }
  throw std::logic_error("this is a bug: a DType without a name");
}

int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::u8:
    case DType::s8:
      return 1;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::i64:
      return 8;
  }
  throw std::logic_error("this is a bug: a DType without a size");
}

namespace {

std::string join(const int64_t* sizes, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) {
    text += (i == 0 ? "" : ", ") + (sizes[i] < 0 ? std::string("any") : std::to_string(sizes[i]));
  }
  return text + "]";
}

}  // namespace

std::string TensorView::describe() const {
  return std::string(dtype_name(dtype)) + " " + join(shape, ndim);
}

void require(const char* name, const TensorView& t, std::initializer_list<int64_t> shape,
             std::initializer_list<DType> dtypes) {
  bool fits = t.ndim == static_cast<int>(shape.size());
  for (int i = 0; fits && i < t.ndim; ++i) {
    const int64_t wanted = shape.begin()[i];
    fits = wanted < 0 || t.shape[i] == wanted;
  }
  bool known = false;
  std::string names;
  for (const DType dtype : dtypes) {
    known = known || t.dtype == dtype;
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  }
  if (!fits || !known) {
    throw std::invalid_argument(std::string(name) + " is " + t.describe() + ", expected " + names +
                                " " + join(shape.begin(), static_cast<int>(shape.size())));
  }
  const int last = t.ndim - 1;
  if (last >= 0 && t.shape[last] > 1 && t.stride[last] != 1) {
    throw std::invalid_argument(std::string(name) + " has gaps of " +
                                std::to_string(t.stride[last]) +
                                " in its last dimension: make it contiguous");
  }
}

void require_distinct(const char* name, const TensorView& t, std::initializer_list<int64_t> shape,
                      std::initializer_list<DType> dtypes) {
  require(name, t, shape, dtypes);
  struct Dimension {
    int64_t stride;
    int64_t size;
  };
  std::vector<Dimension> dimensions;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 0) {
      return;
    }
    if (t.shape[i] > 1) {
      dimensions.push_back({std::abs(t.stride[i]), t.shape[i]});
    }
  }
  std::sort(dimensions.begin(), dimensions.end(),
            [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  int64_t extent = 1;  // of the dimensions so far, from their first to their last value
  for (const Dimension& d : dimensions) {
    if (d.stride < extent) {
      throw std::invalid_argument(std::string(name) + " is " + t.describe() +
                                  " with values that share a place: its strides overlap");
    }
    extent += (d.size - 1) * d.stride;
  }
}

void require_dense(const char* name, const TensorView& t, std::initializer_list<int64_t> shape,
                   std::initializer_list<DType> dtypes) {
  require(name, t, shape, dtypes);
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.stride[i] != expected) {
      throw std::invalid_argument(std::string(name) + " is not contiguous");
    }
    expected *= t.shape[i];
  }
}

}  // namespace qvlfast
