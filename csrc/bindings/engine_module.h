#pragma once

#include <pybind11/pybind11.h>

#include "skip_cache.h"

namespace firstlm {

// Adds the classes and functions of the native engine to a module.
void add_engine(pybind11::module_& m);

// {"bytes", "allocated", "full"}: what keys and values take.
pybind11::dict memory_dict(const MemoryUse& use);

}  // namespace firstlm
