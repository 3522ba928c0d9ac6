// Reductions over the lanes of a warp and the warps of a block: the one helper of all kernels.
#pragma once

#include "span.cuh"

namespace firstlm::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// Combines the values of lanes whose numbers differ in the bits [begin, end), powers of two; all of
// them get the result. By default that is the whole warp. All lanes must take part.
template <class Op, class T>
__device__ T warp_reduce(T value, int begin = 1, int end = kWarpSize) {
  for (int bit = begin; bit < end; bit *= 2) {
    value = Op()(value, __shfl_xor_sync(kAllLanes, value, bit));
  }
  return value;
}

// Combines the values of all threads of a one-dimensional block of whole warps, `identity` being
// what changes nothing; all of them get the result. `partial` may be used again afterwards.
template <class Op, class T>
__device__ T block_reduce(T value, T identity, Shared<T, kWarpSize>& partial) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  value = warp_reduce<Op>(value);
  if (lane == 0) partial.set(warp, value);
  __syncthreads();
  value = warp_reduce<Op>(lane < warps ? partial.get(lane) : identity);
  __syncthreads();
  return value;
}

}  // namespace firstlm::cuda
