// What the bindings of every op need: element types, shapes, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "../dtype.h"

namespace firstlm {

// The core's name of `dtype`; TypeError naming the argument for a type that no kernel takes.
inline DType parse_dtype(const char* name, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " is ", dtype,
                       "; expected float32, bfloat16, float16 or float64");
  }
}

// The type that sums of `dtype` are kept in.
inline at::ScalarType accumulator_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// ValueError unless `tensor` has the `expected` sizes; `letters` says what they are.
inline void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef expected,
                        const char* letters) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, name, " has shape ", tensor.sizes(), "; expected ",
                    letters, " = ", expected);
}

// Threads for one call: torch's setting, and one inside a parallel region of torch's.
inline int num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace firstlm
