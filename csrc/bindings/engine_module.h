#pragma once

#include <pybind11/pybind11.h>

namespace firstlm {

// Adds the classes and functions of the native engine to a module.
void add_engine(pybind11::module_& m);

}  // namespace firstlm
