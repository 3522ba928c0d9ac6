// Appending to the key/value cache for torch: the CPU kernel, and a composite of torch's own ops
// for devices that have no kernel of ours.
#include "../kv.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "kv_arguments.h"

namespace firstlm {
namespace {

using at::Tensor;

// --- CPU ------------------------------------------------------------------------------------

void kv_append_cpu(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                   const Tensor& new_values, const Tensor& start) {
  check_kv_append(keys, values, new_keys, new_values, start);
  const int64_t R = keys.size(0), C = keys.size(2), T = new_keys.size(2);
  const auto first = values_per_row(start, R);
  const int64_t misfit = find_misfit(first.data(), R, C, T);
  TORCH_CHECK_INDEX(misfit == R, "start of row ", misfit, " is ", first[misfit], "; expected [0, ",
                    C - T, "], so that ", T, " tokens fit in ", C, " slots");
  const Tensor k = with_dense_elements(new_keys), v = with_dense_elements(new_values);
  kv_append(kernels(), new_tokens(keys, k), new_tokens(values, v), first.data(), num_threads());
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
