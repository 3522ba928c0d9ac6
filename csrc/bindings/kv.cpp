// Appending to the key/value cache for torch: checks, the CPU kernel, and a composite of torch's
// own ops for devices that have no kernel of ours.
#include "../kv.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "checks.h"

namespace firstlm {
namespace {

using at::Tensor;

// --- Checks ---------------------------------------------------------------------------------

void check_storage(const char* name, const Tensor& storage) {
  parse_dtype(name, storage.scalar_type());
  TORCH_CHECK_VALUE(storage.dim() == 4, name, " has shape ", storage.sizes(),
                    "; expected [R, H, C, D]");
  TORCH_CHECK_VALUE(storage.is_contiguous(), name, " has strides ", storage.strides(),
                    "; expected contiguous storage");
}

void check_tokens(const char* name, const Tensor& tokens, const Tensor& storage, int64_t T) {
  check_shape(name, tokens, {storage.size(0), storage.size(1), T, storage.size(3)}, "[R, H, T, D]");
  check_alike(name, tokens, "the storage", storage);
}

// What every device checks; what `start` holds is not looked at.
void check_kv_append(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                     const Tensor& new_values, const Tensor& start) {
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
}

// --- CPU ------------------------------------------------------------------------------------

NewTokens new_tokens(const Tensor& storage, const Tensor& tokens) {
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

void kv_append_cpu(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                   const Tensor& new_values, const Tensor& start) {
  check_kv_append(keys, values, new_keys, new_values, start);
  const int64_t R = keys.size(0), C = keys.size(2), T = new_keys.size(2);
  const Tensor starts = per_row(start, R);
  const int64_t* first = starts.const_data_ptr<int64_t>();
  const int64_t misfit = find_misfit(first, R, C, T);
  TORCH_CHECK_INDEX(misfit == R, "start of row ", misfit, " is ", first[misfit], "; expected [0, ",
                    C - T, "], so that ", T, " tokens fit in ", C, " slots");
  const Tensor k = with_dense_elements(new_keys), v = with_dense_elements(new_values);
  kv_append(new_tokens(keys, k), new_tokens(values, v), first, num_threads());
}

// --- Composite ------------------------------------------------------------------------------

// slots [R, 1, T, 1]; rows where `fits` [R, 1, 1, 1] is false get back what they hold.
void scatter_tokens(const Tensor& storage, const Tensor& tokens, const Tensor& slots,
                    const Tensor& fits) {
  const Tensor index = slots.expand_as(tokens);
  storage.scatter_(2, index, at::where(fits, tokens, storage.gather(2, index)));
}

void kv_append_composite(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                         const Tensor& new_values, const Tensor& start) {
  check_kv_append(keys, values, new_keys, new_values, start);
  const int64_t R = keys.size(0), C = keys.size(2), T = new_keys.size(2);
  const Tensor first = start.expand({R}).view({R, 1, 1, 1});
  const Tensor slots = first.clamp(0, C - T) + at::arange(T, start.options()).view({1, 1, T, 1});
  const Tensor fits = (first >= 0) & (first <= C - T);
  scatter_tokens(keys, new_keys, slots, fits);
  scatter_tokens(values, new_values, slots, fits);
}

}  // namespace
}  // namespace firstlm

TORCH_LIBRARY_IMPL(firstlm, CPU, m) { m.impl("kv_append", firstlm::kv_append_cpu); }

TORCH_LIBRARY_IMPL(firstlm, CompositeExplicitAutograd, m) {
  m.impl("kv_append", firstlm::kv_append_composite);
}
