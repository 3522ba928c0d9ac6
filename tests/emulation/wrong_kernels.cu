// Kernels with one bug each, which the emulation has to find, and one without.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <stdexcept>

#include "span.cuh"
#include "warp.cuh"

namespace firstlm::cuda {
namespace {

constexpr int kThreads = 64;

enum class Bug {
  kNone,
  kMissingBarrier,
  kReuseWithoutBarrier,
  kBarrierForSome,
  kUnwrittenShared,
  kReadBeyond,
  kWriteBeyond,
  kMisalignedPack,
  kUnwrittenOutput,
  kWrittenTwice,
  kReadsAnothersElement,
  kShuffleForSome,
};

// to[i] = from[kThreads - 1 - i], through shared memory.
__global__ void reverse_kernel(Input<float> from, Output<float> to, InOut<float> state, Bug bug) {
  __shared__ Shared<float, kThreads> values;
  const int i = threadIdx.x;
  const bool is_half = i >= kThreads / 2;
  if (bug != Bug::kUnwrittenShared || is_half) {
    values.set(i, from.load(i + (bug == Bug::kReadBeyond ? 1 : 0)));
  }
  if (bug == Bug::kBarrierForSome && is_half) return;
  if (bug != Bug::kMissingBarrier) __syncthreads();
  if (bug == Bug::kShuffleForSome && i % 2 == 0) warp_reduce<Sum>(1.0f);
  if (bug == Bug::kMisalignedPack) from.load_pack<4>(i % (kThreads / 4));
  if (bug == Bug::kReadsAnothersElement) {
    state.store(i, 0);
    state.load(kThreads - 1 - i);
  }
  if (bug == Bug::kUnwrittenOutput && i == 7) return;
  to.store(i + (bug == Bug::kWriteBeyond ? 1 : 0), values.get(kThreads - 1 - i));
  if (bug == Bug::kReuseWithoutBarrier) values.set(i, 0);
  if (bug == Bug::kWrittenTwice && i == 9) to.store(i, 0);
}

// The missing barrier again, in memory that nothing watches: only the order of threads shows it.
__global__ void unwatched_kernel(Input<float> from, Output<float> to) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = from.load(threadIdx.x);
  to.store(threadIdx.x, values[kThreads - 1 - threadIdx.x]);
}

void reverse(const at::Tensor& from, const at::Tensor& to, int64_t bug) {
  std::vector<float> state(kThreads);
  launch(reverse_kernel, 1, kThreads, nullptr, Input<float>(from.const_data_ptr(), kThreads),
         Output<float>(to.mutable_data_ptr(), kThreads), InOut<float>(state.data(), kThreads),
         static_cast<Bug>(bug));
}

void reverse_unwatched(const at::Tensor& from, const at::Tensor& to) {
  launch(unwatched_kernel, 1, kThreads, nullptr, Input<float>(from.const_data_ptr(), kThreads),
         Output<float>(to.mutable_data_ptr(), kThreads));
}

}  // namespace
}  // namespace firstlm::cuda

TORCH_LIBRARY_FRAGMENT(firstlm_emulated, m) {
  m.def("reverse(Tensor from, Tensor(a!) to, int bug) -> ()");
  m.def("reverse_unwatched(Tensor from, Tensor(a!) to) -> ()");
  m.impl("reverse", c10::DispatchKey::CPU, TORCH_FN(firstlm::cuda::reverse));
  m.impl("reverse_unwatched", c10::DispatchKey::CPU, TORCH_FN(firstlm::cuda::reverse_unwatched));
}
