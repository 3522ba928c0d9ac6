// Elements in device code: the types of dtype.h, with the conversions of the hardware.
#pragma once

#include "../dtype.h"
#include "launch.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace firstlm::cuda {

template <class T>
__device__ inline Accumulator<T> to_accumulator(T x) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __bfloat162float(__ushort_as_bfloat16(x.bits));
  } else if constexpr (std::is_same_v<T, Float16>) {
    return __half2float(__ushort_as_half(x.bits));
  } else {
    return x;
  }
#else
  return widen(x);
#endif
}

// Rounds to nearest, ties to even.
template <class T>
__device__ inline T from_accumulator(Accumulator<T> x) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
    return x;
  }
#else
  T element;
  narrow(x, &element);
  return element;
#endif
}

}  // namespace firstlm::cuda
