// The schemas of every op that has kernels of ours.
#pragma once

#include <torch/library.h>

namespace firstlm {

void define_ops(torch::Library& library);

}  // namespace firstlm
