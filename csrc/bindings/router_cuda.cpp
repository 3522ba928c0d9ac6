// Router scoring for torch on CUDA.
#include "../cuda/launchers.h"
#include "cuda.h"
#include "router_arguments.h"

namespace firstlm {
namespace {

using at::Tensor;

Tensor router_pool_cuda(const Tensor& hidden, const Tensor& prompt_mask, std::string_view kind,
                        int64_t windows) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool(hidden, prompt_mask);
  const OnDeviceOf device(hidden);
  const Tensor states = with_dense_elements(hidden), mask = prompt_mask.contiguous();
  const HiddenStates view = hidden_states(states);
  Tensor pooled = at::empty({view.B, pooling.W() * view.D},
                            hidden.options().dtype(accumulator_of(hidden.scalar_type())));
  Tensor scratch = device.scratch(cuda::router_pool_scratch(view, pooling));
  cuda::router_pool(view, mask.const_data_ptr<bool>(), pooling, scratch.mutable_data_ptr(),
                    pooled.mutable_data_ptr(), device.stream());
  return pooled;
}

Tensor router_pool_backward_cuda(const Tensor& grad_pooled, const Tensor& prompt_mask,
                                 std::string_view kind, int64_t windows, at::ScalarType dtype) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool_backward(grad_pooled, prompt_mask, pooling, dtype);
  const OnDeviceOf device(grad_pooled);
  const Tensor grad = grad_pooled.contiguous(), mask = prompt_mask.contiguous();
  Tensor grad_hidden = at::empty({mask.size(0), mask.size(1), grad.size(1) / pooling.W()},
                                 grad.options().dtype(dtype));
  const HiddenStates view = hidden_states(grad_hidden);
  Tensor scratch = device.scratch(cuda::router_pool_backward_scratch(view));
  cuda::router_pool_backward(view, mask.const_data_ptr<bool>(), pooling, grad.const_data_ptr(),
                             scratch.mutable_data_ptr(), grad_hidden.mutable_data_ptr(),
                             device.stream());
  return grad_hidden;
}

Tensor router_pool_packed_cuda(const Tensor& hidden, const Tensor& offsets, std::string_view kind,
                               int64_t windows) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool_packed(hidden, offsets);
  const OnDeviceOf device(hidden);
  const Tensor states = with_dense_elements(hidden), begins = offsets.contiguous();
  const PackedStates view = packed_states(states, begins);
  Tensor pooled = at::empty({view.B, pooling.W() * view.D},
                            hidden.options().dtype(accumulator_of(hidden.scalar_type())));
  Tensor scratch = device.scratch(cuda::router_pool_packed_scratch(view, pooling));
  cuda::router_pool_packed(view, pooling, scratch.mutable_data_ptr(), pooled.mutable_data_ptr(),
                           device.stream());
  return pooled;
}

Tensor router_pool_packed_backward_cuda(const Tensor& grad_pooled, const Tensor& offsets,
                                        std::string_view kind, int64_t windows, int64_t num_tokens,
                                        at::ScalarType dtype) {
  const Pooling pooling = parse_pooling(kind, windows);
  check_pool_packed_backward(grad_pooled, offsets, pooling, dtype);
  const OnDeviceOf device(grad_pooled);
  const Tensor grad = grad_pooled.contiguous(), begins = offsets.contiguous();
  Tensor grad_hidden =
      at::empty({num_tokens, grad.size(1) / pooling.W()}, grad.options().dtype(dtype));
  cuda::router_pool_packed_backward(packed_states(grad_hidden, begins), pooling,
                                    grad.const_data_ptr(), grad_hidden.mutable_data_ptr(),
                                    device.stream());
  return grad_hidden;
}

template <class T>
Tensor run_router_head(const Tensor& pooled, const HeadParameters& parameters, double norm_eps) {
  const OnDeviceOf device(pooled);
  const Tensor x = pooled.contiguous();
  const RouterHead<T> head = parameters.head<T>(norm_eps);
  const int64_t B = x.size(0);
  Tensor units = at::empty({head.out_weight ? B * head.H : 0}, x.options());
  Tensor logit = at::empty({B}, x.options());
  cuda::router_head(head, x.const_data_ptr<T>(), B, units.mutable_data_ptr<T>(),
                    logit.mutable_data_ptr<T>(), device.stream());
  return logit;
}

Tensor router_head_cuda(const Tensor& pooled, const Tensor& weight, const Tensor& bias,
                        const OptionalTensor& out_weight, const OptionalTensor& out_bias,
                        double norm_eps) {
  check_head(pooled, weight, bias, out_weight, out_bias);
  const auto run =
      pooled.scalar_type() == at::kDouble ? run_router_head<double> : run_router_head<float>;
  return run(pooled, {weight, bias, out_weight, out_bias}, norm_eps);
}

}  // namespace
}  // namespace firstlm

FIRSTLM_CUDA_KERNELS(m) {
  m.impl("router_pool", firstlm::router_pool_cuda);
  m.impl("router_pool_backward", firstlm::router_pool_backward_cuda);
  m.impl("router_pool_packed", firstlm::router_pool_packed_cuda);
  m.impl("router_pool_packed_backward", firstlm::router_pool_packed_backward_cuda);
  m.impl("router_head", firstlm::router_head_cuda);
}
