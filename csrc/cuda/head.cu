// The router's head: pooled features -> one logit per sequence. Letters as in ../router.h.
#include <cmath>

#include "launchers.h"
#include "span.cuh"
#include "warp.cuh"

namespace firstlm::cuda {
namespace {

constexpr int kThreads = 128;

// One block an element of units [B, H].
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads)
    units_kernel(Input<T> pooled, Input<T> weight, Input<T> bias, int64_t H, int64_t F, T norm_eps,
                 Output<T> units) {
  __shared__ Shared<T, kWarpSize> partial;
  const int64_t b = blockIdx.x / H, h = blockIdx.x % H;
  T dot = 0, squares = 0;
  for (int64_t i = threadIdx.x * kPack; i < F; i += kThreads * kPack) {
    const Pack<T, kPack> x = pooled.template load_pack<kPack>(b * F + i);
    const Pack<T, kPack> w = weight.template load_pack<kPack>(h * F + i);
    for (int e = 0; e < kPack; ++e) {
      dot += x.values[e] * w.values[e];
      squares += x.values[e] * x.values[e];
    }
  }
  dot = block_reduce<Sum>(dot, T(0), partial);
  T scale = 1;
  if (norm_eps > 0) {
    scale = 1 / std::sqrt(block_reduce<Sum>(squares, T(0), partial) / F + norm_eps);
  }
  if (threadIdx.x == 0) units.store(blockIdx.x, scale * dot + bias.load(h));
}

template <class T>
__device__ T silu(T x) {
  return x / (1 + std::exp(-x));
}

// One block a sequence.
template <class T>
__global__ void __launch_bounds__(kThreads)
    logit_kernel(Input<T> units, Input<T> out_weight, Input<T> out_bias, int64_t H,
                 Output<T> logit) {
  __shared__ Shared<T, kWarpSize> partial;
  const int64_t b = blockIdx.x;
  T sum = 0;
  for (int64_t h = threadIdx.x; h < H; h += kThreads) {
    sum += silu(units.load(b * H + h)) * out_weight.load(h);
  }
  sum = block_reduce<Sum>(sum, T(0), partial);
  if (threadIdx.x == 0) logit.store(b, sum + out_bias.load(0));
}

}  // namespace

template <class T>
void router_head(const RouterHead<T>& head, const T* pooled, int64_t B, T* units, T* logit,
                 void* stream) {
  const int64_t F = head.F, H = head.H;
  const bool is_linear = head.out_weight == nullptr;
  if (is_linear) units = logit;

  constexpr int kPack = kMaxPack<T>;
  const bool fits = F % kPack == 0 && is_aligned(pooled) && is_aligned(head.weight);
  launch(fits ? units_kernel<T, kPack> : units_kernel<T, 1>, B * H, kThreads, stream,
         Input<T>(pooled, B * F), Input<T>(head.weight, H * F), Input<T>(head.bias, H), H, F,
         static_cast<T>(head.norm_eps), Output<T>(units, B * H));
  if (is_linear) return;
  launch(logit_kernel<T>, B, kThreads, stream, Input<T>(units, B * H), Input<T>(head.out_weight, H),
         Input<T>(head.out_bias, 1), H, Output<T>(logit, B));
}

template void router_head(const RouterHead<float>&, const float*, int64_t, float*, float*, void*);
template void router_head(const RouterHead<double>&, const double*, int64_t, double*, double*,
                          void*);

}  // namespace firstlm::cuda
