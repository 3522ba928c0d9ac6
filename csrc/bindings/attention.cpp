// Decode attention for torch: the CPU kernel, and a composite of torch's own ops for devices that
// have no kernel of ours.
#include "../attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>

#include "attention_arguments.h"

namespace firstlm {
namespace {

using at::Tensor;

// --- CPU ------------------------------------------------------------------------------------

Tensor decode_attention_cpu(const Tensor& query, const Tensor& keys, const Tensor& values,
                            const Tensor& begin, const Tensor& end, double scale, double soft_cap) {
  check_decode_attention(query, keys, values, begin, end, soft_cap);
  const int64_t R = query.size(0), C = keys.size(2);
  const Tensor q = with_dense_elements(query);
  const Tensor k = with_dense_elements(keys), v = with_dense_elements(values);
  const Tensor begins = per_row(begin, R), ends = per_row(end, R);
  const DecodeAttention attention = attention_view(q, k, v, begins, ends, scale, soft_cap);
  const int64_t misfit = find_misfit(attention.begin, attention.end, R, C);
  TORCH_CHECK_INDEX(misfit == R, "row ", misfit, " sees slots [", attention.begin[misfit], ", ",
                    attention.end[misfit], "); expected 0 <= begin <= end <= ", C);
  Tensor scratch = at::empty({scratch_elements(attention)},
                             query.options().dtype(accumulator_of(query.scalar_type())));
  Tensor output = at::empty(query.sizes(), query.options());
  decode_attention(kernels(), attention, num_threads(), scratch.mutable_data_ptr(),
                   output.mutable_data_ptr());
  return output;
}

// --- Composite ------------------------------------------------------------------------------

Tensor decode_attention_composite(const Tensor& query, const Tensor& keys, const Tensor& values,
                                  const Tensor& begin, const Tensor& end, double scale,
                                  double soft_cap) {
  check_decode_attention(query, keys, values, begin, end, soft_cap);
  const int64_t R = query.size(0), H = keys.size(1), C = keys.size(2);
  const at::ScalarType dtype = accumulator_of(query.scalar_type());
  const Tensor slots = at::arange(C, begin.options());
  const Tensor seen =
      (slots >= begin.expand({R}).unsqueeze(1)) & (slots < end.expand({R}).unsqueeze(1));  // [R, C]
  const Tensor grouped = query.to(dtype).unflatten(1, {H, query.size(1) / H});  // [R, H, G, D]
  Tensor scores = at::matmul(grouped, keys.to(dtype).transpose(2, 3)) * scale;  // [R, H, G, C]
  if (soft_cap > 0) scores = soft_cap * at::tanh(scores / soft_cap);
  const Tensor seen_scores = seen.view({R, 1, 1, C});
  constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
  const Tensor weights = at::softmax(at::where(seen_scores, scores, kMinusInfinity), -1);
  // What stands in other slots may be infinite, and the softmax of nothing is NaN.
  const Tensor seen_weights = at::where(seen_scores, weights, 0);
  const Tensor seen_values = at::where(seen.view({R, 1, C, 1}), values.to(dtype), 0);
  return at::matmul(seen_weights, seen_values).flatten(1, 2).to(query.scalar_type());
}

}  // namespace
}  // namespace firstlm

TORCH_LIBRARY_IMPL(firstlm, CPU, m) { m.impl("decode_attention", firstlm::decode_attention_cpu); }

TORCH_LIBRARY_IMPL(firstlm, CompositeExplicitAutograd, m) {
  m.impl("decode_attention", firstlm::decode_attention_composite);
}
