// The arguments of decode_attention on every device: what is checked, and the core's view of them.
#pragma once

#include <ATen/core/Tensor.h>

#include "../attention.h"
#include "checks.h"

namespace firstlm {

// What every device checks; what `begin` and `end` hold is not looked at.
inline void check_decode_attention(const at::Tensor& query, const at::Tensor& keys,
                                   const at::Tensor& values, const at::Tensor& begin,
                                   const at::Tensor& end, double soft_cap) {
  parse_dtype("query", query.scalar_type());
  TORCH_CHECK_VALUE(query.dim() == 3, "query has shape ", query.sizes(), "; expected [R, Hq, D]");
  TORCH_CHECK_VALUE(keys.dim() == 4, "keys has shape ", keys.sizes(), "; expected [R, H, C, D]");
  const int64_t R = query.size(0), Hq = query.size(1), D = query.size(2);
  const int64_t H = keys.size(1), C = keys.size(2);
  TORCH_CHECK_VALUE(D > 0, "query has shape ", query.sizes(), "; expected a head_dim of 1 or more");
  check_shape("keys", keys, {R, H, C, D}, "[R, H, C, D], with query's R and D,");
  check_shape("values", values, keys.sizes(), "[R, H, C, D], the shape of keys,");
  TORCH_CHECK_VALUE(H > 0 && Hq % H == 0, "query has ", Hq, " heads and keys has ", H,
                    "; expected a multiple of the key/value heads");
  check_alike("keys", keys, "query", query);
  check_alike("values", values, "query", query);
  check_per_row("begin", begin, R, query);
  check_per_row("end", end, R, query);
  TORCH_CHECK_VALUE(soft_cap >= 0, "soft_cap is ", soft_cap, "; expected 0 (none) or more");
}

inline CacheView cache_view(const at::Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

// Of checked tensors with dense elements; begin and end are [R] and outlive the view.
inline DecodeAttention attention_view(const at::Tensor& query, const at::Tensor& keys,
                                      const at::Tensor& values, const at::Tensor& begin,
                                      const at::Tensor& end, double scale, double soft_cap) {
  return {
      .dtype = parse_dtype("query", query.scalar_type()),
      .R = query.size(0),
      .Hq = query.size(1),
      .H = keys.size(1),
      .C = keys.size(2),
      .D = query.size(2),
      .query = query.const_data_ptr(),
      .stride_R = query.stride(0),
      .stride_H = query.stride(1),
      .keys = cache_view(keys),
      .values = cache_view(values),
      .begin = begin.const_data_ptr<int64_t>(),
      .end = end.const_data_ptr<int64_t>(),
      .scale = scale,
      .soft_cap = soft_cap,
  };
}

}  // namespace firstlm
