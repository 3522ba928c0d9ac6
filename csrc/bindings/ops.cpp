// The library of ops, and what it says about itself.
#include "../cpu/kernels.h"
#include "schemas.h"

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
  firstlm::define_ops(m);
}
