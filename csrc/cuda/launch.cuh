// The one way to start a kernel. Compiled by anything but a CUDA compiler, this header takes the
// whole language extension from cuda_emulation.h, which only the tests have.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__

#include <cuda_runtime.h>

namespace firstlm::cuda {

// What spans tell about every access; the emulation has a class of this name that checks them.
struct AccessLog {
  AccessLog(const void*, int64_t, int64_t, bool) {}
  __device__ void read(int64_t, int) const {}
  __device__ void write(int64_t, int) const {}
};

// The same for a shared array of N elements.
template <int N>
struct SharedLog {
  __device__ void read(int) const {}
  __device__ void write(int) const {}
};

// Runs kernel(args...) on `grid` blocks of `block` threads in `stream`, a cudaStream_t. Does not
// wait for it. Throws std::runtime_error if it cannot be started.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("a CUDA kernel of firstlm could not be started: ") +
                             cudaGetErrorString(error));
  }
}

}  // namespace firstlm::cuda

#else
#include "cuda_emulation.h"
#endif

namespace firstlm::cuda {

// x * y blocks. Throws std::runtime_error for more than CUDA starts at once, which it would cut to
// 32 bits in silence.
inline dim3 grid(int64_t x, int64_t y = 1) {
  constexpr int64_t kMaxX = std::numeric_limits<int32_t>::max(), kMaxY = 65535;
  if (x > kMaxX || y > kMaxY) {
    throw std::runtime_error("tensors too large for one CUDA kernel: it would take " +
                             std::to_string(x) + " x " + std::to_string(y) +
                             " blocks; accepted are " + std::to_string(kMaxX) + " x " +
                             std::to_string(kMaxY));
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

}  // namespace firstlm::cuda
