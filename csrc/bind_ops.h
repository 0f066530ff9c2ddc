// Bindings of the ops of the model.
#pragma once

#include <pybind11/pybind11.h>

namespace qvlfast {

void bind_ops(pybind11::module_& m);

}  // namespace qvlfast
