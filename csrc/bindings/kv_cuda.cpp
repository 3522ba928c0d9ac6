// Appending to the key/value cache for torch on CUDA.
#include "../cuda/launchers.h"
#include "cuda.h"
#include "kv_arguments.h"

namespace firstlm {
namespace {

using at::Tensor;

void kv_append_cuda(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                    const Tensor& new_values, const Tensor& start) {
  check_kv_append(keys, values, new_keys, new_values, start);
  const OnDeviceOf device(keys);
  const Tensor k = with_dense_elements(new_keys), v = with_dense_elements(new_values);
  const Tensor starts = per_row(start, keys.size(0));
  cuda::kv_append(new_tokens(keys, k), new_tokens(values, v), starts.const_data_ptr<int64_t>(),
                  device.stream());
}

}  // namespace
}  // namespace firstlm

FIRSTLM_CUDA_KERNELS(m) { m.impl("kv_append", firstlm::kv_append_cuda); }
