// Router scoring for torch: the CPU kernels, and a composite of torch's own ops for devices
// that have no kernel of ours.
#include "../router.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "../buffer.h"
#include "router_arguments.h"

namespace firstlm {
namespace {

using at::Tensor;

// --- CPU ------------------------------------------------------------------------------------

Tensor router_pool_cpu(const Tensor& hidden, const Tensor& prompt_mask, std::string_view kind,
                       int64_t windows) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool(hidden, prompt_mask);
  // Views of [B, T, D] are read in place; only elements that lie apart are copied.
  const Tensor states = with_dense_elements(hidden), mask = prompt_mask.contiguous();
  const HiddenStates view = hidden_states(states);
  Tensor pooled = at::empty({view.B, pooling.W() * view.D},
                            hidden.options().dtype(accumulator_of(hidden.scalar_type())));
  const int threads = num_threads();
  Buffer<std::byte> scratch;  // cheaper than a tensor
  scratch.reserve(scratch_elements(view, pooling, threads) * pooled.element_size());
  router_pool(kernels(), view, mask.const_data_ptr<bool>(), pooling, threads, scratch.data(),
              pooled.mutable_data_ptr());
  return pooled;
}

Tensor router_pool_backward_cpu(const Tensor& grad_pooled, const Tensor& prompt_mask,
                                std::string_view kind, int64_t windows, at::ScalarType dtype) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool_backward(grad_pooled, prompt_mask, pooling, dtype);
  const Tensor grad = grad_pooled.contiguous(), mask = prompt_mask.contiguous();
  Tensor grad_hidden = at::empty({mask.size(0), mask.size(1), grad.size(1) / pooling.W()},
                                 grad.options().dtype(dtype));
  router_pool_backward(hidden_states(grad_hidden), mask.const_data_ptr<bool>(), pooling,
                       grad.const_data_ptr(), num_threads(), grad_hidden.mutable_data_ptr());
  return grad_hidden;
}

// ValueError unless offsets [B + 1] rise from 0 to N.
void check_rising(const Tensor& offsets, int64_t N) {
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t B = offsets.size(0) - 1;
  TORCH_CHECK_VALUE(offset[0] == 0 && offset[B] == N, "offsets begin with ", offset[0],
                    " and end with ", offset[B], "; expected 0 and ", N, ", the number of tokens");
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(offset[b] <= offset[b + 1], "offsets[", b + 1, "] is ", offset[b + 1],
                      ", less than offsets[", b, "] = ", offset[b]);
  }
}

Tensor router_pool_packed_cpu(const Tensor& hidden, const Tensor& offsets, std::string_view kind,
                              int64_t windows) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool_packed(hidden, offsets);
  const Tensor states = with_dense_elements(hidden), begins = offsets.contiguous();
  check_rising(begins, hidden.size(0));
  const PackedStates view = packed_states(states, begins);
  Tensor pooled = at::empty({view.B, pooling.W() * view.D},
                            hidden.options().dtype(accumulator_of(hidden.scalar_type())));
  const int threads = num_threads();
  Buffer<std::byte> scratch;
  scratch.reserve(scratch_elements(view, pooling, threads) * pooled.element_size());
  router_pool_packed(kernels(), view, pooling, threads, scratch.data(), pooled.mutable_data_ptr());
  return pooled;
}

Tensor router_pool_packed_backward_cpu(const Tensor& grad_pooled, const Tensor& offsets,
                                       std::string_view kind, int64_t windows, int64_t num_tokens,
                                       at::ScalarType dtype) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool_packed_backward(grad_pooled, offsets, pooling, dtype);
  const Tensor grad = grad_pooled.contiguous(), begins = offsets.contiguous();
  check_rising(begins, num_tokens);
  Tensor grad_hidden =
      at::empty({num_tokens, grad.size(1) / pooling.W()}, grad.options().dtype(dtype));
  router_pool_packed_backward(packed_states(grad_hidden, begins), pooling, grad.const_data_ptr(),
                              num_threads(), grad_hidden.mutable_data_ptr());
  return grad_hidden;
}

template <class T>
Tensor run_router_head(const Tensor& pooled, const HeadParameters& parameters, double norm_eps) {
  const Tensor x = pooled.contiguous();
  const RouterHead<T> head = parameters.head<T>(norm_eps);
  const int64_t B = x.size(0);
  Tensor units;  // of the bottleneck head
  if (head.out_weight) units = at::empty({B * head.H}, x.options());
  Tensor logit = at::empty({B}, x.options());
  router_head(kernels(), head, x.const_data_ptr<T>(), B, num_threads(),
              units.defined() ? units.mutable_data_ptr<T>() : nullptr, logit.mutable_data_ptr<T>());
  return logit;
}

Tensor router_head_cpu(const Tensor& pooled, const Tensor& weight, const Tensor& bias,
                       const OptionalTensor& out_weight, const OptionalTensor& out_bias,
                       double norm_eps) {
  check_head(pooled, weight, bias, out_weight, out_bias);
  const auto run =
      pooled.scalar_type() == at::kDouble ? run_router_head<double> : run_router_head<float>;
  return run(pooled, {weight, bias, out_weight, out_bias}, norm_eps);
}

// --- Composite ------------------------------------------------------------------------------

// [B, W] each: pooled_range of every window of sequences of n [B, 1] prompt tokens.
struct Ranges {
  Tensor begin, end;

  Ranges(const Tensor& n, Pooling pooling) {
    const int64_t W = pooling.W();
    const Tensor w = at::arange(W, n.options()).unsqueeze(0);  // [1, W]
    const bool is_last = pooling.kind == PoolKind::kLast;
    begin = is_last ? n - 1 : (w * n).floor_divide(W);
    end = is_last ? n : at::maximum(begin + 1, ((w + 1) * n).floor_divide(W));
  }
};

// [B, W, T]: what each token weighs in each feature, of tokens that `may_count` and have a rank
// among those of their sequence, both [B, 1, T].
Tensor weights_of(const Tensor& rank, const Tensor& may_count, const Ranges& ranges,
                  at::ScalarType dtype) {
  const Tensor begin = ranges.begin.unsqueeze(2), end = ranges.end.unsqueeze(2);
  return ((rank >= begin) & (rank < end) & may_count).to(dtype) / (end - begin).to(dtype);
}

// Rows of zeros where there is no prompt.
Tensor pooling_weights(const Tensor& prompt_mask, Pooling pooling, at::ScalarType dtype) {
  const Tensor rank = prompt_mask.cumsum(1, at::kLong).sub(1).unsqueeze(1);
  const Ranges ranges(prompt_mask.sum(1, true, at::kLong), pooling);
  return weights_of(rank, prompt_mask.unsqueeze(1), ranges, dtype);
}

// [B, W, N], for N tokens that lie one sequence after the other.
Tensor packed_weights(const Tensor& offsets, int64_t N, Pooling pooling, at::ScalarType dtype) {
  const int64_t B = offsets.size(0) - 1;
  const Tensor begin = offsets.narrow(0, 0, B).unsqueeze(1);  // [B, 1]
  const Tensor n = offsets.narrow(0, 1, B).unsqueeze(1) - begin;
  const Tensor rank = (at::arange(N, offsets.options()).unsqueeze(0) - begin).unsqueeze(1);
  return weights_of(rank, (rank >= 0) & (rank < n.unsqueeze(2)), Ranges(n, pooling), dtype);
}

// weights [..., N] x states [..., N, D]. What has no weight may be infinite.
Tensor weighted(const Tensor& weights, const Tensor& states) {
  const Tensor of_states = weights.unsqueeze(-1);
  return at::where(of_states != 0, states, 0) * of_states;
}

Tensor router_pool_composite(const Tensor& hidden, const Tensor& prompt_mask, std::string_view kind,
                             int64_t windows) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool(hidden, prompt_mask);
  const at::ScalarType dtype = accumulator_of(hidden.scalar_type());
  const Tensor weights = pooling_weights(prompt_mask, pooling, dtype);  // [B, W, T]
  std::vector<Tensor> pooled;
  for (int64_t w = 0; w < pooling.W(); ++w) {
    pooled.push_back(weighted(weights.select(1, w), hidden.to(dtype)).sum(1));
  }
  return at::cat(pooled, 1);
}

Tensor router_pool_backward_composite(const Tensor& grad_pooled, const Tensor& prompt_mask,
                                      std::string_view kind, int64_t windows,
                                      at::ScalarType dtype) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool_backward(grad_pooled, prompt_mask, pooling, dtype);
  const Tensor weights = pooling_weights(prompt_mask, pooling, grad_pooled.scalar_type());
  const Tensor grad = grad_pooled.unflatten(1, {pooling.W(), grad_pooled.size(1) / pooling.W()});
  return at::bmm(weights.transpose(1, 2), grad).to(dtype);
}

Tensor router_pool_packed_composite(const Tensor& hidden, const Tensor& offsets,
                                    std::string_view kind, int64_t windows) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool_packed(hidden, offsets);
  const at::ScalarType dtype = accumulator_of(hidden.scalar_type());
  const int64_t N = hidden.size(0), D = hidden.size(1), B = offsets.size(0) - 1;
  if (B == 0) return at::zeros({0, pooling.W() * D}, hidden.options().dtype(dtype));
  const Tensor weights = packed_weights(offsets, N, pooling, dtype).sum(0);  // [W, N]
  // Clamped for offsets that do not rise, which cannot be looked at here.
  const Tensor token = at::arange(N, offsets.options());
  const Tensor sequence = (at::bucketize(token, offsets, false, true) - 1).clamp(0, B - 1);
  std::vector<Tensor> pooled;
  for (int64_t w = 0; w < pooling.W(); ++w) {
    const Tensor states = weighted(weights.select(0, w), hidden.to(dtype));
    pooled.push_back(at::zeros({B, D}, states.options()).index_add_(0, sequence, states));
  }
  return at::cat(pooled, 1);
}

Tensor router_pool_packed_backward_composite(const Tensor& grad_pooled, const Tensor& offsets,
                                             std::string_view kind, int64_t windows,
                                             int64_t num_tokens, at::ScalarType dtype) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool_packed_backward(grad_pooled, offsets, pooling, dtype);
  const Tensor weights =
      packed_weights(offsets, num_tokens, pooling, grad_pooled.scalar_type()).flatten(0, 1);
  const int64_t B = offsets.size(0) - 1, D = grad_pooled.size(1) / pooling.W();
  return weights.t().matmul(grad_pooled.reshape({B * pooling.W(), D})).to(dtype);
}

Tensor router_head_composite(const Tensor& pooled, const Tensor& weight, const Tensor& bias,
                             const OptionalTensor& out_weight, const OptionalTensor& out_bias,
                             double norm_eps) {
  check_head(pooled, weight, bias, out_weight, out_bias);
  Tensor x = pooled;
  if (norm_eps > 0) x = x * at::rsqrt(x.square().mean(1, true) + norm_eps);
  const Tensor units = at::linear(x, weight, bias);
  return (out_weight ? at::linear(at::silu(units), *out_weight, *out_bias) : units).squeeze(1);
}

}  // namespace
}  // namespace firstlm

TORCH_LIBRARY_IMPL(firstlm, CPU, m) {
  m.impl("router_pool", firstlm::router_pool_cpu);
  m.impl("router_pool_backward", firstlm::router_pool_backward_cpu);
  m.impl("router_pool_packed", firstlm::router_pool_packed_cpu);
  m.impl("router_pool_packed_backward", firstlm::router_pool_packed_backward_cpu);
  m.impl("router_head", firstlm::router_head_cpu);
}

TORCH_LIBRARY_IMPL(firstlm, CompositeExplicitAutograd, m) {
  m.impl("router_pool", firstlm::router_pool_composite);
  m.impl("router_pool_backward", firstlm::router_pool_backward_composite);
  m.impl("router_pool_packed", firstlm::router_pool_packed_composite);
  m.impl("router_pool_packed_backward", firstlm::router_pool_packed_backward_composite);
  m.impl("router_head", firstlm::router_head_composite);
}
