// Bindings of the ops of the model. Every one lets other Python threads run while it computes.
#include "bind_ops.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "bind_tensor.h"
#include "gemm.h"
#include "pack.h"
#include "rowwise.h"

namespace py = pybind11;

namespace qvlfast {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;
using Indices32 = py::array_t<int32_t, py::array::c_style>;
using Indices64 = py::array_t<int64_t, py::array::c_style>;

// Tests name an instruction set; everyone else uses the one of the process.
Isa chosen(const std::optional<std::string>& name) {
  if (!name) {
    return isa();
  }
  for (const Isa known : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (*name == isa_name(known)) {
      return known;
    }
  }
  throw std::invalid_argument("isa '" + *name + "' is unknown; use scalar, avx2, avx512 or amx");
}

std::vector<QuantisedPart> pairs(const std::vector<std::tuple<Tensor, Tensor>>& parts) {
  std::vector<QuantisedPart> made;
  for (const auto& [values, scale] : parts) {
    made.push_back({values, {}, scale});
  }
  return made;
}

std::vector<QuantisedPart> triples(const std::vector<std::tuple<Tensor, Tensor, Tensor>>& parts) {
  std::vector<QuantisedPart> made;
  for (const auto& [values, multiplier, scale] : parts) {
    made.push_back({values, multiplier, scale});
  }
  return made;
}

void bind_weights(py::module_& m) {
  py::class_<PackedWeight>(m, "PackedWeight")
      .def_property_readonly("format", [](const PackedWeight& w) { return format_name(w.format); })
      .def_readonly("n", &PackedWeight::n)
      .def_readonly("k", &PackedWeight::k)
      .def_readonly("gated", &PackedWeight::gated)
      .def_property_readonly("nbytes", &PackedWeight::nbytes);
  m.def(
      "pack_floats",
      [](const std::vector<Tensor>& parts, const std::string& format, bool gated) {
        if (format != "f32" && format != "bf16") {
          throw std::invalid_argument("format '" + format + "' is unknown; use f32 or bf16");
        }
        const std::vector<TensorView> views(parts.begin(), parts.end());
        return pack_floats(views, format == "f32" ? Format::f32 : Format::bf16, gated);
      },
      py::arg("parts"), py::arg("format"), py::arg("gated") = false, Unlocked());
  m.def(
      "pack_int8",
      [](const std::vector<std::tuple<Tensor, Tensor>>& parts, bool gated) {
        return pack_int8(pairs(parts), gated);
      },
      py::arg("parts"), py::arg("gated") = false, Unlocked());
  m.def(
      "pack_int4",
      [](const std::vector<std::tuple<Tensor, Tensor, Tensor>>& parts, int64_t group, bool gated) {
        return pack_int4(triples(parts), group, gated);
      },
      py::arg("parts"), py::arg("group"), py::arg("gated") = false, Unlocked());
  m.def(
      "unpack",
      [](const PackedWeight& weight, const Tensor& out) {
        require_dense("out", out, {weight.n, weight.k}, {DType::f32});
        unpack(weight, out.as<float>());
      },
      py::arg("weight"), py::arg("out"), Unlocked());
}

void bind_rows(py::module_& m) {
  using Name = std::optional<std::string>;
  m.def(
      "quantise_rows",
      [](const Tensor& x, const Tensor& values, const Tensor& scale, const Name& isa) {
        quantise_rows(x, values, scale, chosen(isa));
      },
      py::arg("x"), py::arg("values"), py::arg("scale"), py::arg("isa") = py::none(), Unlocked());
  m.def(
      "quantise_int4",
      [](const Tensor& x, int64_t group, const Tensor& pairs, const Tensor& multiplier,
         const Tensor& scale,
         const Name& isa) { quantise_int4(x, group, pairs, multiplier, scale, chosen(isa)); },
      py::arg("x"), py::arg("group"), py::arg("pairs"), py::arg("multiplier"), py::arg("scale"),
      py::arg("isa") = py::none(), Unlocked());
  m.def(
      "pool",
      [](const Tensor& x, const Tensor& read, const Tensor& weight, float eps, bool unit,
         const Tensor& out,
         const Name& isa) { pool(x, read, weight, eps, unit, out, chosen(isa)); },
      py::arg("x"), py::arg("read"), py::arg("weight"), py::arg("eps"), py::arg("unit"),
      py::arg("out"), py::arg("isa") = py::none(), Unlocked());
  m.def(
      "score",
      [](const Tensor& x, const Tensor& read, const Tensor& weight, float eps,
         const Tensor& answers, const Tensor& out,
         const Name& isa) { score(x, read, weight, eps, answers, out, chosen(isa)); },
      py::arg("x"), py::arg("read"), py::arg("weight"), py::arg("eps"), py::arg("answers"),
      py::arg("out"), py::arg("isa") = py::none(), Unlocked());
  m.def(
      "rms_norm",
      [](const Tensor& x, const Tensor& weight, float eps, const Tensor& out, const Name& isa) {
        rms_norm(x, weight, eps, out, chosen(isa));
      },
      py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"), py::arg("isa") = py::none(),
      Unlocked());
  m.def(
      "rms_norm_rows",
      [](const Tensor& x, const Tensor& weight, float eps, const Tensor& values,
         const Tensor& scale,
         const Name& isa) { rms_norm_rows(x, weight, eps, values, scale, chosen(isa)); },
      py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("values"), py::arg("scale"),
      py::arg("isa") = py::none(), Unlocked());
  m.def(
      "layer_norm",
      [](const Tensor& x, const Tensor& weight, const Tensor& bias, float eps, const Tensor& out,
         const Name& isa) { layer_norm(x, weight, bias, eps, out, chosen(isa)); },
      py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("out"),
      py::arg("isa") = py::none(), Unlocked());
  m.def(
      "rope",
      [](const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& out,
         const Name& isa) { rope(x, cos, sin, out, chosen(isa)); },
      py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("out"), py::arg("isa") = py::none(),
      Unlocked());
  m.def(
      "norm_rope",
      [](const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, float eps,
         const Tensor& out,
         const Name& isa) { norm_rope(x, weight, cos, sin, eps, out, chosen(isa)); },
      py::arg("x"), py::arg("weight"), py::arg("cos"), py::arg("sin"), py::arg("eps"),
      py::arg("out"), py::arg("isa") = py::none(), Unlocked());
}

void bind_attention(py::module_& m) {
  m.def(
      "attention",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const Indices32& cu_q,
         const Indices32& cu_k, const Indices32& parent, bool causal, float scale,
         const std::optional<Indices64>& read, const Tensor& out,
         const std::optional<std::string>& isa) {
        if (cu_q.ndim() != 1 || cu_k.ndim() != 1 || parent.ndim() != 1 ||
            cu_q.size() != parent.size() + 1 || cu_k.size() != parent.size() + 1) {
          throw std::invalid_argument("cu_q and cu_k have one entry more than parent");
        }
        const SegmentForest forest{cu_q.data(), cu_k.data(), parent.data(), parent.size()};
        const int64_t* reads = read ? read->data() : nullptr;
        const int64_t count = read ? read->size() : 0;
        const py::gil_scoped_release unlocked;
        attention(q, k, v, forest, causal, scale, reads, count, out, chosen(isa));
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_q"), py::arg("cu_k"), py::arg("parent"),
      py::arg("causal"), py::arg("scale"), py::arg("read"), py::arg("out"),
      py::arg("isa") = py::none());
}

}  // namespace

void bind_ops(py::module_& m) {
  bind_weights(m);
  m.def(
      "gemm",
      [](const Tensor& x, const Tensor& x_scale, const PackedWeight& weight, const Tensor& bias,
         const std::string& activation, const Tensor& residual, const Tensor& out,
         const std::optional<std::string>& isa) {
        gemm(x, x_scale, weight, bias, activation, residual, out, chosen(isa));
      },
      py::arg("x"), py::arg("x_scale"), py::arg("weight"), py::arg("bias"), py::arg("activation"),
      py::arg("residual"), py::arg("out"), py::arg("isa") = py::none(), Unlocked());
  bind_rows(m);
  bind_attention(m);
}

}  // namespace qvlfast
