// The Python module `qvlfast._C`: bindings and the checks of what Python hands in, nothing else.
// std::invalid_argument becomes ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bind_ops.h"
#include "cpu.h"
#include "parallel.h"
#include "patches.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict features;
  for (const auto& [name, present] : qvlfast::cpu_feature_list()) {
    features[name] = present;
  }
  return features;
}

// str(array.shape), str(array.dtype) and the like, for messages.
std::string text_of(const py::array& array, const char* attribute) {
  return py::str(array.attr(attribute)).cast<std::string>();
}

py::array_t<uint8_t> extract_patches(const py::array& frames, int64_t patch, int64_t temporal,
                                     int64_t merge) {
  if (!frames.dtype().is(py::dtype::of<uint8_t>())) {
    throw py::type_error("frames must be uint8, got " + text_of(frames, "dtype"));
  }
  if (frames.ndim() != 4 || frames.shape(3) != 3) {
    throw py::value_error("frames must be [T, H, W, 3], got shape " + text_of(frames, "shape"));
  }
  if ((frames.flags() & py::array::c_style) == 0) {
    throw py::value_error("frames must be C-contiguous, got strides " + text_of(frames, "strides") +
                          " for shape " + text_of(frames, "shape") +
                          "; use numpy.ascontiguousarray");
  }
  const qvlfast::PatchShape shape{frames.shape(0), frames.shape(1), frames.shape(2),
                                  patch,           temporal,        merge};
  shape.check();
  py::array_t<uint8_t> out({shape.rows(), shape.row_bytes()});
  const auto* source = static_cast<const uint8_t*>(frames.data());
  uint8_t* target = out.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    qvlfast::extract_patches(source, shape, target);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of qvlfast.";
  m.def("cpu_features", &cpu_features, "What this processor can do, by name.");
  m.def(
      "isa", [] { return qvlfast::isa_name(qvlfast::isa()); },
      "The instruction set in use: scalar, avx2, avx512 or amx. QVLFAST_ISA forces less.");
  m.def(
      "best_isa", [] { return qvlfast::isa_name(qvlfast::best_isa()); },
      "The best instruction set of this processor.");
  m.def("num_threads", &qvlfast::num_threads, "Threads that share the work of one kernel.");
  m.def("set_num_threads", &qvlfast::set_num_threads, py::arg("n"),
        "Sets the number of threads that share the work of one kernel.");
  m.def("extract_patches", &extract_patches, py::arg("frames").noconvert(), py::arg("patch"),
        py::arg("temporal"), py::arg("merge"),
        "uint8 [T, H, W, 3] frames to uint8 [N, K] patches in merge order.");
  qvlfast::bind_ops(m);
}
