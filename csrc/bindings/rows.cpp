// Masked layer execution for torch: the CPU kernels, and a composite of torch's own ops for devices
// that have no kernel of ours.
#include "../rows.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "rows_arguments.h"

namespace firstlm {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- CPU ------------------------------------------------------------------------------------

void check_in_batch(const Tensor& rows, int64_t B) {
  const int64_t* begin = rows.const_data_ptr<int64_t>();
  const int64_t* end = begin + rows.numel();
  const int64_t* wrong =
      std::find_if(begin, end, [&](int64_t row) { return row < -1 || row >= B; });
  TORCH_CHECK_INDEX(wrong == end, "rows[", wrong - begin, "] is ", *wrong,
                    "; expected -1 or a row of a batch of ", B);
}

// update_of [B] of the core, with an error for rows that lie outside of the batch or repeat.
Tensor inverted_rows(const Tensor& rows, int64_t B) {
  Tensor update_of = at::empty({B}, rows.options());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t r = invert_rows(row, rows.numel(), B, update_of.mutable_data_ptr<int64_t>());
  if (r < rows.numel()) {
    check_in_batch(rows, B);
    TORCH_CHECK_VALUE(false, "rows names ", row[r], " twice; expected distinct rows");
  }
  return update_of;
}

std::tuple<Tensor, Tensor> plan_rows_cpu(const Tensor& keep_mask) {
  check_keep_mask(keep_mask);
  const Tensor mask = keep_mask.contiguous();
  const int64_t B = mask.size(0), L = mask.size(1);
  Tensor rows = at::empty({L, B}, mask.options().dtype(at::kLong));
  Tensor counts = at::empty({L}, mask.options().dtype(at::kLong));
  plan_rows(mask.const_data_ptr<bool>(), B, L, rows.mutable_data_ptr<int64_t>(),
            counts.mutable_data_ptr<int64_t>());
  return {rows, counts};
}

Tensor gather_rows_cpu(const Tensor& hidden, const Tensor& rows) {
  check_batch("hidden", hidden);
  check_rows(rows, hidden.device());
  const Tensor index = rows.contiguous(), batch = with_contiguous_rows(hidden);
  check_in_batch(index, batch.size(0));
  at::DimVector sizes(batch.sizes());
  sizes[0] = index.size(0);
  Tensor gathered = at::empty(sizes, batch.options());
  gather_rows(rows_of(batch), index.const_data_ptr<int64_t>(), index.size(0),
              row_bytes_of(gathered), num_threads(), mutable_rows_of(gathered));
  return gathered;
}

void add_rows_cpu(const Tensor& hidden, const Tensor& rows, const Tensor& update) {
  const Tensor index = rows.contiguous(), values = with_contiguous_rows(update);
  check_in_batch(index, hidden.size(0));
  scatter_add_rows(kernels(), mutable_rows_of(hidden), index.const_data_ptr<int64_t>(),
                   index.size(0), rows_of(values), row_size_of(hidden, false), num_threads());
}

void scatter_add_rows_cpu_(Tensor& hidden, const Tensor& rows, const Tensor& update) {
  check_scatter_add(hidden, rows, update);
  check_overlap(hidden, update);
  const Tensor batch = with_contiguous_rows(hidden);
  add_rows_cpu(batch, rows, update);
  if (!batch.is_same(hidden)) hidden.copy_(batch);
}

Tensor gather_rows_backward_cpu(const Tensor& grad_gathered, const Tensor& rows,
                                int64_t batch_size) {
  check_batch("grad_gathered", grad_gathered);
  at::DimVector sizes(grad_gathered.sizes());
  sizes[0] = batch_size;
  const Tensor grad_hidden = at::zeros(sizes, grad_gathered.options());
  check_scatter_add(grad_hidden, rows, grad_gathered);
  add_rows_cpu(grad_hidden, rows, grad_gathered);
  return grad_hidden;
}

// The arguments of a scatter in the layout that the core reads, kept alive.
struct Scatter {
  Tensor rows, values, gate, update_of;

  Scatter(const Tensor& hidden, const Tensor& rows, const Tensor& values,
          const OptionalTensor& gate)
      : rows(rows.contiguous()),
        values(with_contiguous_rows(values)),
        gate(gate ? gate->contiguous() : Tensor()),
        update_of(inverted_rows(this->rows, hidden.size(0))) {}

  RowUpdate update() const {
    return {rows.const_data_ptr<int64_t>(), rows.size(0), rows_of(values),
            gate.defined() ? gate.const_data_ptr() : nullptr};
  }
};

Tensor scatter_rows_cpu(const Tensor& hidden, const Tensor& rows, const Tensor& values,
                        const OptionalTensor& gate) {
  check_scatter(hidden, rows, values, gate);
  const Scatter scatter(hidden, rows, values, gate);
  const Tensor batch = with_contiguous_rows(hidden);
  Tensor out = at::empty(hidden.sizes(), hidden.options());
  scatter_rows(kernels(), rows_of(batch), batch.size(0), scatter.update(),
               scatter.update_of.const_data_ptr<int64_t>(), row_size_of(batch, !gate),
               num_threads(), mutable_rows_of(out));
  return out;
}

void scatter_rows_cpu_(Tensor& hidden, const Tensor& rows, const Tensor& values,
                       const OptionalTensor& gate) {
  check_scatter(hidden, rows, values, gate);
  check_overlap(hidden, values);
  const Scatter scatter(hidden, rows, values, gate);
  const Tensor batch = with_contiguous_rows(hidden);
  scatter_rows_in_place(kernels(), mutable_rows_of(batch), scatter.update(),
                        row_size_of(batch, !gate), num_threads());
  if (!batch.is_same(hidden)) hidden.copy_(batch);
}

// --- Composite ------------------------------------------------------------------------------

// [R] -> [R, 1, ...], to go with `like` [R, ...].
Tensor aligned_with(const Tensor& of_rows, const Tensor& like) {
  at::DimVector sizes(like.dim(), 1);
  sizes[0] = of_rows.size(0);
  return of_rows.reshape(sizes);
}

std::tuple<Tensor, Tensor> plan_rows_composite(const Tensor& keep_mask) {
  check_keep_mask(keep_mask);
  const Tensor keep = keep_mask.t();                    // [L, B]
  const Tensor counts = keep.sum(1, false, at::kLong);  // [L]
  const Tensor order = at::argsort(~keep, true, 1);     // kept rows first, in their order
  const Tensor place = at::arange(keep.size(1), counts.options());
  return {at::where(place < counts.unsqueeze(1), order, -1), counts};
}

// What rows name of a batch of B. What they hold is never copied to the host.
Tensor named(const Tensor& rows, int64_t B) { return (rows >= 0).logical_and_(rows < B); }

Tensor gather_rows_composite(const Tensor& hidden, const Tensor& rows) {
  check_batch("hidden", hidden);
  check_rows(rows, hidden.device());
  // Row B of zeros, for those that there are not.
  at::DimVector sizes(hidden.sizes());
  const int64_t B = sizes[0];
  sizes[0] = 1;
  const Tensor padded = at::cat({hidden, at::zeros(sizes, hidden.options())});
  return padded.index_select(0, at::where(named(rows, B), rows, B));
}

Tensor scatter_rows_composite(const Tensor& hidden, const Tensor& rows, const Tensor& values,
                              const OptionalTensor& gate) {
  check_scatter(hidden, rows, values, gate);
  at::DimVector sizes(hidden.sizes());
  const int64_t B = sizes[0];
  sizes[0] = 1;
  Tensor padded = at::cat({hidden, at::zeros(sizes, hidden.options())});
  const Tensor index = at::where(named(rows, B), rows, B);
  if (!gate) return padded.index_copy_(0, index, values).narrow_copy(0, 0, B);
  const at::ScalarType dtype = gate->scalar_type();
  const Tensor weight = aligned_with(*gate, values), old = padded.index_select(0, index);
  const Tensor mixed = at::lerp(old.to(dtype), values.to(dtype), weight).to(values.scalar_type());
  const Tensor blend = at::where(weight == 0, old, at::where(weight == 1, values, mixed));
  return padded.index_copy_(0, index, blend).narrow_copy(0, 0, B);
}

void scatter_rows_composite_(Tensor& hidden, const Tensor& rows, const Tensor& values,
                             const OptionalTensor& gate) {
  check_scatter(hidden, rows, values, gate);
  check_overlap(hidden, values);
  hidden.copy_(scatter_rows_composite(hidden, rows, values, gate));
}

void scatter_add_rows_composite_(Tensor& hidden, const Tensor& rows, const Tensor& update) {
  check_scatter_add(hidden, rows, update);
  check_overlap(hidden, update);
  if (hidden.size(0) == 0) return;
  const Tensor is_named = named(rows, hidden.size(0));
  hidden.index_add_(0, at::where(is_named, rows, 0),
                    at::where(aligned_with(is_named, update), update, 0));
}

Tensor gather_rows_backward_composite(const Tensor& grad_gathered, const Tensor& rows,
                                      int64_t batch_size) {
  check_batch("grad_gathered", grad_gathered);
  at::DimVector sizes(grad_gathered.sizes());
  sizes[0] = batch_size;
  Tensor grad_hidden = at::zeros(sizes, grad_gathered.options());
  scatter_add_rows_composite_(grad_hidden, rows, grad_gathered);
  return grad_hidden;
}

}  // namespace
}  // namespace firstlm

TORCH_LIBRARY_IMPL(firstlm, CPU, m) {
  m.impl("plan_rows", firstlm::plan_rows_cpu);
  m.impl("gather_rows", firstlm::gather_rows_cpu);
  m.impl("gather_rows_backward", firstlm::gather_rows_backward_cpu);
  m.impl("scatter_rows", firstlm::scatter_rows_cpu);
  m.impl("scatter_rows_", firstlm::scatter_rows_cpu_);
  m.impl("scatter_add_rows_", firstlm::scatter_add_rows_cpu_);
}

TORCH_LIBRARY_IMPL(firstlm, CompositeExplicitAutograd, m) {
  m.impl("plan_rows", firstlm::plan_rows_composite);
  m.impl("gather_rows", firstlm::gather_rows_composite);
  m.impl("gather_rows_backward", firstlm::gather_rows_backward_composite);
  m.impl("scatter_rows", firstlm::scatter_rows_composite);
  m.impl("scatter_rows_", firstlm::scatter_rows_composite_);
  m.impl("scatter_add_rows_", firstlm::scatter_add_rows_composite_);
}
