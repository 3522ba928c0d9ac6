// What the bindings of every op need: element types, shapes, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

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

// TypeError or ValueError unless `tensor` has the element type and the device of `other`.
inline void check_alike(const char* name, const at::Tensor& tensor, const char* other_name,
                        const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), name, " is ", tensor.scalar_type(),
                   "; expected ", other.scalar_type(), ", the type of ", other_name);
  TORCH_CHECK_VALUE(tensor.device() == other.device(), name, " is on ", tensor.device(),
                    "; expected ", other.device(), ", where ", other_name, " is");
}

// Whether two tensors of one element type lie in the same stretch of one storage. Their elements
// may still take turns there, as those of two column ranges of a matrix do.
inline bool extents_meet(const at::Tensor& a, const at::Tensor& b) {
  if (!a.is_alias_of(b) || a.numel() == 0 || b.numel() == 0) return false;
  const auto last = [](const at::Tensor& tensor) {
    int64_t offset = tensor.storage_offset();
    for (int64_t i = 0; i < tensor.dim(); ++i) offset += (tensor.size(i) - 1) * tensor.stride(i);
    return offset;
  };
  return last(a) >= b.storage_offset() && last(b) >= a.storage_offset();
}

// One index for each of R rows, or one for all: int64 [R] or [1], on the device of `other`.
inline void check_per_row(const char* name, const at::Tensor& index, int64_t R,
                          const at::Tensor& other) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, name, " is ", index.scalar_type(),
                   "; expected int64");
  TORCH_CHECK_VALUE(index.dim() == 1 && (index.size(0) == R || index.size(0) == 1), name,
                    " has shape ", index.sizes(), "; expected [R] = [", R, "], or [1]");
  TORCH_CHECK_VALUE(index.device() == other.device(), name, " is on ", index.device(),
                    "; expected ", other.device(), ", where the other tensors are");
}

// [R] contiguous, of an index that passed check_per_row.
inline at::Tensor per_row(const at::Tensor& index, int64_t R) {
  return index.size(0) == R ? index.contiguous() : index.expand({R}).contiguous();
}

// The same on the host, without the price of tensors for a few numbers.
inline c10::SmallVector<int64_t, 16> values_per_row(const at::Tensor& index, int64_t R) {
  c10::SmallVector<int64_t, 16> values(R);
  const int64_t* first = index.const_data_ptr<int64_t>();
  const int64_t stride = index.size(0) == R ? index.stride(0) : 0;
  for (int64_t r = 0; r < R; ++r) values[r] = first[r * stride];
  return values;
}

// `tensor`, copied only if the elements of its last dimension lie apart.
inline at::Tensor with_dense_elements(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

// Threads for one call: torch's setting, and one inside a parallel region of torch's.
inline int num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace firstlm
