// The arguments of kv_append on every device: what is checked, and the core's view of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

#include "../kv.h"
#include "checks.h"

namespace firstlm {

inline void check_storage(const char* name, const at::Tensor& storage) {
  parse_dtype(name, storage.scalar_type());
  TORCH_CHECK_VALUE(storage.dim() == 4, name, " has shape ", storage.sizes(),
                    "; expected [R, H, C, D]");
  TORCH_CHECK_VALUE(storage.is_contiguous(), name, " has strides ", storage.strides(),
                    "; expected contiguous storage");
}

inline void check_tokens(const char* name, const at::Tensor& tokens, const at::Tensor& storage,
                         int64_t T) {
  check_shape(name, tokens, {storage.size(0), storage.size(1), T, storage.size(3)}, "[R, H, T, D]");
  check_alike(name, tokens, "the storage", storage);
}

// No element of `tokens` lies in contiguous `storage`, which is written.
inline void check_apart(const char* name, const at::Tensor& tokens, const char* storage_name,
                        const at::Tensor& storage) {
  TORCH_CHECK_VALUE(!extents_meet(tokens, storage), name, " overlaps ", storage_name,
                    "; expected memory of its own");
}

// What every device checks; what `start` holds is not looked at.
inline void check_kv_append(const at::Tensor& keys, const at::Tensor& values,
                            const at::Tensor& new_keys, const at::Tensor& new_values,
                            const at::Tensor& start) {
  check_storage("keys", keys);
  check_storage("values", values);
  const int64_t R = keys.size(0), H = keys.size(1), C = keys.size(2);
  check_shape("values", values, {R, H, C, values.size(3)}, "[R, H, C, D], with keys' R, H, C,");
  check_alike("values", values, "keys", keys);
  TORCH_CHECK_VALUE(new_keys.dim() == 4, "new_keys has shape ", new_keys.sizes(),
                    "; expected [R, H, T, D]");
  const int64_t T = new_keys.size(2);
  check_tokens("new_keys", new_keys, keys, T);
  check_tokens("new_values", new_values, values, T);
  TORCH_CHECK_VALUE(T <= C, "new_keys has ", T, " tokens; expected at most the storage's ", C,
                    " slots");
  check_per_row("start", start, R, keys);
  check_apart("values", values, "keys", keys);
  for (const auto& [name, storage] : {std::pair{"keys", &keys}, {"values", &values}}) {
    check_apart("new_keys", new_keys, name, *storage);
    check_apart("new_values", new_values, name, *storage);
  }
}

// `tokens` with dense elements, on their way to `storage`.
inline NewTokens new_tokens(const at::Tensor& storage, const at::Tensor& tokens) {
  return {storage.mutable_data_ptr(),
          tokens.const_data_ptr(),
          storage.size(0),
          storage.size(1),
          storage.size(2),
          tokens.size(2),
          storage.size(3),
          tokens.stride(0),
          tokens.stride(1),
          tokens.stride(2),
          storage.element_size()};
}

}  // namespace firstlm
