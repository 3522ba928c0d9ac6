// Every op's schema. Kernels are registered where they are defined: one file per stem here, fake
// kernels and autograd in python/firstlm/ops.py.
#include <torch/library.h>

#include "../cpu/kernels.h"

namespace {

std::string isa() { return firstlm::kernels().isa; }

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const firstlm::Kernels* table : firstlm::available_kernels()) names.push_back(table->isa);
  return names;
}

}  // namespace

TORCH_LIBRARY(firstlm, m) {
  m.def("isa() -> str", isa);
  m.def("isa_levels() -> str[]", isa_levels);

  m.def("router_pool(Tensor hidden, Tensor prompt_mask, str kind, int windows) -> Tensor");
  m.def(
      "router_pool_backward(Tensor grad_pooled, Tensor prompt_mask, str kind, int windows, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "router_head(Tensor pooled, Tensor weight, Tensor bias, Tensor? out_weight, "
      "Tensor? out_bias, float norm_eps) -> Tensor");

  m.def(
      "kv_append(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, "
      "Tensor start) -> ()");
}
