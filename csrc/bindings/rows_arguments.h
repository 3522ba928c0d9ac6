// The rows ops' arguments on every device: what is checked, and the core's view of them.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "../rows.h"
#include "checks.h"

namespace firstlm {

inline void check_device(const char* name, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, " is on ", tensor.device(), "; expected ",
                    device, ", where the other tensors are");
}

inline void check_keep_mask(const at::Tensor& keep_mask) {
  TORCH_CHECK_TYPE(keep_mask.scalar_type() == at::kBool, "keep_mask is ", keep_mask.scalar_type(),
                   "; expected bool, true for the layers that a sequence keeps");
  TORCH_CHECK_VALUE(keep_mask.dim() == 2, "keep_mask has shape ", keep_mask.sizes(),
                    "; expected [B, L]");
}

inline void check_batch(const char* name, const at::Tensor& hidden) {
  TORCH_CHECK_VALUE(hidden.dim() >= 1, name, " has no dimensions; expected [B, ...]");
}

inline void check_rows(const at::Tensor& rows, at::Device device) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kLong, "rows is ", rows.scalar_type(),
                   "; expected int64");
  TORCH_CHECK_VALUE(rows.dim() == 1, "rows has shape ", rows.sizes(), "; expected [R]");
  check_device("rows", rows, device);
}

inline void check_values(const char* name, const at::Tensor& values, const at::Tensor& hidden,
                         const at::Tensor& rows) {
  at::DimVector expected(hidden.sizes());
  expected[0] = rows.size(0);
  check_shape(name, values, expected, "[R, ...]");
  check_alike(name, values, "hidden", hidden);
}

inline void check_scatter(const at::Tensor& hidden, const at::Tensor& rows,
                          const at::Tensor& values, const std::optional<at::Tensor>& gate) {
  check_batch("hidden", hidden);
  check_rows(rows, hidden.device());
  check_values("values", values, hidden, rows);
  if (!gate) return;
  parse_dtype("hidden", hidden.scalar_type());
  check_shape("gate", *gate, rows.sizes(), "[R]");
  const at::ScalarType expected = accumulator_of(hidden.scalar_type());
  TORCH_CHECK_TYPE(gate->scalar_type() == expected, "gate is ", gate->scalar_type(), "; expected ",
                   expected, " for ", hidden.scalar_type(), " hidden states");
  check_device("gate", *gate, hidden.device());
}

inline void check_scatter_add(const at::Tensor& hidden, const at::Tensor& rows,
                              const at::Tensor& update) {
  check_batch("hidden", hidden);
  check_rows(rows, hidden.device());
  check_values("update", update, hidden, rows);
  parse_dtype("hidden", hidden.scalar_type());
}

// Whether the elements of every row of [B, ...] are contiguous, wherever the rows lie.
inline bool has_contiguous_rows(const at::Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; i >= 1; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return tensor.numel() == 0;
    expected *= tensor.size(i);
  }
  return true;
}

// In place: no element of hidden is two rows', and none is read while it is written. What torch
// cannot tell of views with gaps is refused where they lie in the same stretch of memory.
inline void check_overlap(const at::Tensor& hidden, const at::Tensor& values) {
  at::assert_no_internal_overlap(hidden);
  at::assert_no_overlap(hidden, values);
  TORCH_CHECK(hidden.size(0) < 2 || !has_contiguous_rows(hidden) ||
                  hidden.stride(0) * hidden.size(0) >= hidden.numel(),
              "the rows of hidden overlap each other; expected a row in memory of its own");
  TORCH_CHECK(!extents_meet(hidden, values),
              "hidden, which is written, and the values lie in the same memory; expected values in "
              "memory of their own");
}

inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return has_contiguous_rows(tensor) ? tensor : tensor.contiguous();
}

inline int64_t stride_of(const at::Tensor& tensor) {
  return tensor.stride(0) * tensor.element_size();
}

inline ConstRows rows_of(const at::Tensor& tensor) {
  return {static_cast<const std::byte*>(tensor.const_data_ptr()), stride_of(tensor)};
}

inline Rows mutable_rows_of(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.mutable_data_ptr()), stride_of(tensor)};
}

inline int64_t row_bytes_of(const at::Tensor& tensor) {
  return tensor.size(0) == 0 ? 0 : tensor.numel() / tensor.size(0) * tensor.element_size();
}

// For copies of types that no arithmetic is done in, the type says nothing.
inline RowSize row_size_of(const at::Tensor& tensor, bool is_copied_only) {
  const DType dtype =
      is_copied_only ? DType::kFloat32 : parse_dtype("hidden", tensor.scalar_type());
  return {dtype, row_bytes_of(tensor)};
}

}  // namespace firstlm
