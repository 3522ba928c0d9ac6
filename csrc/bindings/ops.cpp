// The library of ops, and what it says about itself.
#include <ATen/core/LegacyTypeDispatch.h>

#include "../cpu/kernels.h"
#include "schemas.h"

namespace {

std::string isa() { return firstlm::kernels().isa; }

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const firstlm::Kernels* table : firstlm::available_kernels()) names.push_back(table->isa);
  return names;
}

// What an op writes in place becomes a new version of the tensor, so that autograd notices where it
// had saved the old one. torch's own fallback does so for what an op returns only.
void bump_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                   torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::AliasInfo* alias = arguments[i].alias_info();
    if (!alias || !alias->isWrite()) continue;
    written.push_back(torch::jit::peek(*stack, i, arguments.size()).toTensor());
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& tensor : written) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY(firstlm, m) {
  m.def("isa() -> str", isa);
  m.def("isa_levels() -> str[]", isa_levels);
  firstlm::define_ops(m);
}

TORCH_LIBRARY_IMPL(firstlm, ADInplaceOrView, m) {
  const auto in_place = [] { return torch::CppFunction::makeFromBoxedFunction<&bump_versions>(); };
  m.impl("kv_append", in_place());
  m.impl("scatter_rows_", in_place());
  m.impl("scatter_add_rows_", in_place());
}
