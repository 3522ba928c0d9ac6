// The ops under a name of their own: for CPU tensors, by the CUDA kernels as emulated.
#include "../../csrc/bindings/schemas.h"
#include "cuda_emulation.h"

TORCH_LIBRARY(firstlm_emulated, m) {
  firstlm::define_ops(m);
  m.def("set_backward(bool backward) -> ()", emulation::set_backward);
}
