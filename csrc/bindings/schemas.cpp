// Every op's schema. Kernels are registered where they are defined: one file per stem here, fake
// kernels and autograd in python/firstlm/ops.
#include "schemas.h"

namespace firstlm {

void define_ops(torch::Library& m) {
  m.def("router_pool(Tensor hidden, Tensor prompt_mask, str kind, int windows) -> Tensor");
  m.def(
      "router_pool_backward(Tensor grad_pooled, Tensor prompt_mask, str kind, int windows, "
      "ScalarType dtype) -> Tensor");
  m.def("router_pool_packed(Tensor hidden, Tensor offsets, str kind, int windows) -> Tensor");
  m.def(
      "router_pool_packed_backward(Tensor grad_pooled, Tensor offsets, str kind, int windows, "
      "SymInt num_tokens, ScalarType dtype) -> Tensor");
  m.def(
      "router_head(Tensor pooled, Tensor weight, Tensor bias, Tensor? out_weight, "
      "Tensor? out_bias, float norm_eps) -> Tensor");

  m.def(
      "kv_append(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, "
      "Tensor start) -> ()");

  m.def("plan_rows(Tensor keep_mask) -> (Tensor rows, Tensor counts)");
  m.def("gather_rows(Tensor hidden, Tensor rows) -> Tensor");
  m.def("gather_rows_backward(Tensor grad_gathered, Tensor rows, SymInt batch_size) -> Tensor");
  m.def("scatter_rows(Tensor hidden, Tensor rows, Tensor values, Tensor? gate) -> Tensor");
  m.def("scatter_rows_(Tensor(a!) hidden, Tensor rows, Tensor values, Tensor? gate) -> ()");
  m.def("scatter_add_rows_(Tensor(a!) hidden, Tensor rows, Tensor update) -> ()");

  m.def(
      "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor begin, Tensor end, "
      "float scale, float soft_cap) -> Tensor");
}

}  // namespace firstlm
