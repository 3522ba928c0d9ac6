// Decode attention for torch on CUDA.
#include "../cuda/launchers.h"
#include "attention_arguments.h"
#include "cuda.h"

namespace firstlm {
namespace {

using at::Tensor;

Tensor decode_attention_cuda(const Tensor& query, const Tensor& keys, const Tensor& values,
                             const Tensor& begin, const Tensor& end, double scale,
                             double soft_cap) {
  check_decode_attention(query, keys, values, begin, end, soft_cap);
  const OnDeviceOf device(query);
  const int64_t R = query.size(0);
  const Tensor q = with_dense_elements(query);
  const Tensor k = with_dense_elements(keys), v = with_dense_elements(values);
  const Tensor begins = per_row(begin, R), ends = per_row(end, R);
  const DecodeAttention attention = attention_view(q, k, v, begins, ends, scale, soft_cap);
  Tensor scratch = device.scratch(cuda::decode_attention_scratch(attention));
  Tensor output = at::empty(query.sizes(), query.options());
  cuda::decode_attention(attention, scratch.mutable_data_ptr(), output.mutable_data_ptr(),
                         device.stream());
  return output;
}

}  // namespace
}  // namespace firstlm

FIRSTLM_CUDA_KERNELS(m) { m.impl("decode_attention", firstlm::decode_attention_cuda); }
