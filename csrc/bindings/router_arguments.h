// The router ops' arguments on every device: what is checked, and the core's view of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../router.h"
#include "checks.h"

namespace firstlm {

using OptionalTensor = std::optional<at::Tensor>;

inline Pooling parse_pooling(std::string_view kind, int64_t windows) {
  TORCH_CHECK_VALUE(windows >= 1, "windows is ", windows, "; expected 1 or more");
  if (kind == "mean") return {PoolKind::kMean, windows};
  if (kind == "windowed_mean") return {PoolKind::kWindowedMean, windows};
  if (kind == "last") return {PoolKind::kLast, windows};
  TORCH_CHECK_VALUE(false, "kind is '", kind, "'; expected 'mean', 'windowed_mean' or 'last'");
}

inline void check_prompt_mask(const at::Tensor& prompt_mask, at::Device device) {
  TORCH_CHECK_TYPE(prompt_mask.scalar_type() == at::kBool, "prompt_mask is ",
                   prompt_mask.scalar_type(), "; expected bool, true for the prompt's tokens");
  TORCH_CHECK_VALUE(prompt_mask.dim() == 2, "prompt_mask has shape ", prompt_mask.sizes(),
                    "; expected [B, T]");
  TORCH_CHECK_VALUE(prompt_mask.device() == device, "prompt_mask is on ", prompt_mask.device(),
                    "; expected ", device, ", where the other tensor is");
}

inline void check_pool(const at::Tensor& hidden, const at::Tensor& prompt_mask) {
  TORCH_CHECK_VALUE(hidden.dim() == 3, "hidden has shape ", hidden.sizes(), "; expected [B, T, D]");
  parse_dtype("hidden", hidden.scalar_type());
  check_prompt_mask(prompt_mask, hidden.device());
  check_shape("prompt_mask", prompt_mask, hidden.sizes().slice(0, 2), "[B, T]");
}

inline void check_grad_pooled(const at::Tensor& grad_pooled, int64_t B, Pooling pooling,
                              at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      grad_pooled.dim() == 2 && grad_pooled.size(0) == B && grad_pooled.size(1) % pooling.W() == 0,
      "grad_pooled has shape ", grad_pooled.sizes(), "; expected [", B, ", a multiple of ",
      pooling.W(), "]");
  TORCH_CHECK_TYPE(grad_pooled.scalar_type() == accumulator_of(dtype), "grad_pooled is ",
                   grad_pooled.scalar_type(), "; expected ", accumulator_of(dtype), " for ", dtype,
                   " hidden states");
}

inline void check_pool_backward(const at::Tensor& grad_pooled, const at::Tensor& prompt_mask,
                                Pooling pooling, at::ScalarType dtype) {
  parse_dtype("dtype", dtype);
  check_prompt_mask(prompt_mask, grad_pooled.device());
  check_grad_pooled(grad_pooled, prompt_mask.size(0), pooling, dtype);
}

inline void check_offsets(const at::Tensor& offsets, at::Device device) {
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kLong, "offsets is ", offsets.scalar_type(),
                   "; expected int64");
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets has shape ",
                    offsets.sizes(), "; expected [B + 1]");
  TORCH_CHECK_VALUE(offsets.device() == device, "offsets is on ", offsets.device(), "; expected ",
                    device, ", where the other tensor is");
}

inline void check_pool_packed(const at::Tensor& hidden, const at::Tensor& offsets) {
  TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden has shape ", hidden.sizes(), "; expected [N, D]");
  parse_dtype("hidden", hidden.scalar_type());
  check_offsets(offsets, hidden.device());
}

inline void check_pool_packed_backward(const at::Tensor& grad_pooled, const at::Tensor& offsets,
                                       Pooling pooling, at::ScalarType dtype) {
  parse_dtype("dtype", dtype);
  check_offsets(offsets, grad_pooled.device());
  check_grad_pooled(grad_pooled, offsets.size(0) - 1, pooling, dtype);
}

inline void check_head_parameter(const char* name, const at::Tensor& parameter,
                                 const at::Tensor& pooled, at::IntArrayRef shape,
                                 const char* letters) {
  check_shape(name, parameter, shape, letters);
  TORCH_CHECK_TYPE(parameter.scalar_type() == pooled.scalar_type(), name, " is ",
                   parameter.scalar_type(), "; expected ", pooled.scalar_type(),
                   ", the type of pooled");
  TORCH_CHECK_VALUE(parameter.device() == pooled.device(), name, " is on ", parameter.device(),
                    "; expected ", pooled.device(), ", where pooled is");
}

inline void check_head(const at::Tensor& pooled, const at::Tensor& weight, const at::Tensor& bias,
                       const OptionalTensor& out_weight, const OptionalTensor& out_bias) {
  TORCH_CHECK_TYPE(pooled.scalar_type() == at::kFloat || pooled.scalar_type() == at::kDouble,
                   "pooled is ", pooled.scalar_type(), "; expected float32 or float64");
  TORCH_CHECK_VALUE(pooled.dim() == 2, "pooled has shape ", pooled.sizes(), "; expected [B, F]");
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight has shape ", weight.sizes(), "; expected [H, F]");
  const int64_t H = weight.size(0), F = pooled.size(1);
  check_head_parameter("weight", weight, pooled, {H, F}, "[H, F]");
  check_head_parameter("bias", bias, pooled, {H}, "[H]");
  TORCH_CHECK_VALUE(out_weight.has_value() == out_bias.has_value(),
                    out_weight ? "out_weight" : "out_bias", " was given without its ",
                    out_weight ? "out_bias" : "out_weight", "; a bottleneck head needs both");
  if (out_weight) {
    check_head_parameter("out_weight", *out_weight, pooled, {1, H}, "[1, H]");
    check_head_parameter("out_bias", *out_bias, pooled, {1}, "[1]");
  } else {
    TORCH_CHECK_VALUE(H == 1, "weight has shape ", weight.sizes(), "; a linear head expects [1, ",
                      F, "], a bottleneck head also out_weight and out_bias");
  }
}

// [B, T, D] whose tokens have dense elements.
inline HiddenStates hidden_states(const at::Tensor& states) {
  return {states.const_data_ptr(), parse_dtype("hidden", states.scalar_type()),
          states.size(0),          states.size(1),
          states.size(2),          states.stride(0),
          states.stride(1)};
}

// [N, D] with dense elements; offsets [B + 1] contiguous.
inline PackedStates packed_states(const at::Tensor& states, const at::Tensor& offsets) {
  return {states.const_data_ptr(),
          parse_dtype("hidden", states.scalar_type()),
          states.size(0),
          states.size(1),
          offsets.size(0) - 1,
          states.stride(0),
          offsets.const_data_ptr<int64_t>()};
}

// Parameters that passed check_head, in the layout that the core reads, kept alive.
struct HeadParameters {
  at::Tensor weight, bias, out_weight, out_bias;  // the last two undefined for the linear head

  HeadParameters(const at::Tensor& weight, const at::Tensor& bias, const OptionalTensor& out_weight,
                 const OptionalTensor& out_bias)
      : weight(weight.contiguous()),
        bias(bias.contiguous()),
        out_weight(out_weight ? out_weight->contiguous() : at::Tensor()),
        out_bias(out_bias ? *out_bias : at::Tensor()) {}

  template <class T>
  RouterHead<T> head(double norm_eps) const {
    const bool is_linear = !out_weight.defined();
    return {weight.size(1),
            weight.size(0),
            weight.const_data_ptr<T>(),
            bias.const_data_ptr<T>(),
            is_linear ? nullptr : out_weight.const_data_ptr<T>(),
            is_linear ? nullptr : out_bias.const_data_ptr<T>(),
            norm_eps};
  }
};

}  // namespace firstlm
