// What the bindings of the CUDA kernels need. They use torch's device-generic API alone, so they
// compile beside a torch without CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

// What follows registers kernels for CUDA tensors; or, where tests build the same sources for the
// host, kernels for CPU tensors in a library of their own.
#ifdef FIRSTLM_EMULATE
#define FIRSTLM_CUDA_KERNELS(m) TORCH_LIBRARY_IMPL(firstlm_emulated, CPU, m)
#else
#define FIRSTLM_CUDA_KERNELS(m) TORCH_LIBRARY_IMPL(firstlm, CUDA, m)
#endif

namespace firstlm {

// While it lives, the device of `tensor` is the current one.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const at::Tensor& tensor) : device_(tensor.device()), guard_(device_) {}

  // The device's current stream, as launchers take it.
  void* stream() const {
    if (device_.is_cpu()) return nullptr;
    return c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle();
  }

  at::Tensor scratch(int64_t bytes) const {
    at::Tensor memory = at::empty({bytes}, at::TensorOptions(device_).dtype(at::kByte));
#ifdef FIRSTLM_EMULATE
    memory.fill_(0xff);  // NaN and -1: what is read before it is written shows
#endif
    return memory;
  }

 private:
  at::Device device_;
  c10::DeviceGuard guard_;
};

}  // namespace firstlm
