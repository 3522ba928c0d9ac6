// Masked layer execution for torch on CUDA.
#include <ATen/ops/zeros.h>

#include <tuple>

#include "../cuda/launchers.h"
#include "cuda.h"
#include "rows_arguments.h"

namespace firstlm {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

at::DimVector with_batch_size(const Tensor& tensor, int64_t batch_size) {
  at::DimVector sizes(tensor.sizes());
  sizes[0] = batch_size;
  return sizes;
}

std::tuple<Tensor, Tensor> plan_rows_cuda(const Tensor& keep_mask) {
  check_keep_mask(keep_mask);
  const OnDeviceOf device(keep_mask);
  const Tensor mask = keep_mask.contiguous();
  const int64_t B = mask.size(0), L = mask.size(1);
  Tensor rows = at::empty({L, B}, mask.options().dtype(at::kLong));
  Tensor counts = at::empty({L}, mask.options().dtype(at::kLong));
  cuda::plan_rows(mask.const_data_ptr<bool>(), B, L, rows.mutable_data_ptr<int64_t>(),
                  counts.mutable_data_ptr<int64_t>(), device.stream());
  return {rows, counts};
}

Tensor gather_rows_cuda(const Tensor& hidden, const Tensor& rows) {
  check_batch("hidden", hidden);
  check_rows(rows, hidden.device());
  const OnDeviceOf device(hidden);
  const Tensor index = rows.contiguous(), batch = with_contiguous_rows(hidden);
  const int64_t R = index.size(0);
  Tensor gathered = at::empty(with_batch_size(batch, R), batch.options());
  cuda::gather_rows(rows_of(batch), batch.size(0), index.const_data_ptr<int64_t>(), R,
                    row_bytes_of(gathered), gathered.mutable_data_ptr(), device.stream());
  return gathered;
}

void add_rows_cuda(const Tensor& hidden, const Tensor& rows, const Tensor& update, void* stream) {
  const Tensor index = rows.contiguous(), values = with_contiguous_rows(update);
  cuda::scatter_add_rows(mutable_rows_of(hidden), hidden.size(0), index.const_data_ptr<int64_t>(),
                         index.size(0), rows_of(values), row_size_of(hidden, false), stream);
}

void scatter_add_rows_cuda_(Tensor& hidden, const Tensor& rows, const Tensor& update) {
  check_scatter_add(hidden, rows, update);
  check_overlap(hidden, update);
  const OnDeviceOf device(hidden);
  const Tensor batch = with_contiguous_rows(hidden);
  add_rows_cuda(batch, rows, update, device.stream());
  if (!batch.is_same(hidden)) hidden.copy_(batch);
}

Tensor gather_rows_backward_cuda(const Tensor& grad_gathered, const Tensor& rows,
                                 int64_t batch_size) {
  check_batch("grad_gathered", grad_gathered);
  const OnDeviceOf device(grad_gathered);
  const Tensor grad_hidden =
      at::zeros(with_batch_size(grad_gathered, batch_size), grad_gathered.options());
  check_scatter_add(grad_hidden, rows, grad_gathered);
  add_rows_cuda(grad_hidden, rows, grad_gathered, device.stream());
  return grad_hidden;
}

// The arguments of a scatter in the layout that kernels read, kept alive.
struct Scatter {
  Tensor rows, values, gate;

  Scatter(const Tensor& rows, const Tensor& values, const OptionalTensor& gate)
      : rows(rows.contiguous()),
        values(with_contiguous_rows(values)),
        gate(gate ? gate->contiguous() : Tensor()) {}

  RowUpdate update() const {
    return {rows.const_data_ptr<int64_t>(), rows.size(0), rows_of(values),
            gate.defined() ? gate.const_data_ptr() : nullptr};
  }
};

Tensor scatter_rows_cuda(const Tensor& hidden, const Tensor& rows, const Tensor& values,
                         const OptionalTensor& gate) {
  check_scatter(hidden, rows, values, gate);
  const OnDeviceOf device(hidden);
  const Scatter scatter(rows, values, gate);
  const Tensor batch = with_contiguous_rows(hidden);
  Tensor out = at::empty(hidden.sizes(), hidden.options());
  cuda::scatter_rows(rows_of(batch), batch.size(0), scatter.update(), row_size_of(batch, !gate),
                     out.mutable_data_ptr(), device.stream());
  return out;
}

void scatter_rows_cuda_(Tensor& hidden, const Tensor& rows, const Tensor& values,
                        const OptionalTensor& gate) {
  check_scatter(hidden, rows, values, gate);
  check_overlap(hidden, values);
  const OnDeviceOf device(hidden);
  const Scatter scatter(rows, values, gate);
  const Tensor batch = with_contiguous_rows(hidden);
  cuda::scatter_rows_in_place(mutable_rows_of(batch), batch.size(0), scatter.update(),
                              row_size_of(batch, !gate), device.stream());
  if (!batch.is_same(hidden)) hidden.copy_(batch);
}

}  // namespace
}  // namespace firstlm

FIRSTLM_CUDA_KERNELS(m) {
  m.impl("plan_rows", firstlm::plan_rows_cuda);
  m.impl("gather_rows", firstlm::gather_rows_cuda);
  m.impl("gather_rows_backward", firstlm::gather_rows_backward_cuda);
  m.impl("scatter_rows", firstlm::scatter_rows_cuda);
  m.impl("scatter_rows_", firstlm::scatter_rows_cuda_);
  m.impl("scatter_add_rows_", firstlm::scatter_add_rows_cuda_);
}
