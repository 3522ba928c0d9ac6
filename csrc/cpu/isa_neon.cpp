#include <arm_neon.h>

#include "kernels.h"

namespace firstlm {
namespace {
#include "vec_neon.h"
// After the vectors that they end in.
#include "dot_neon.h"
// After the vectors that it is written over.
#include "kernels-inl.h"
}  // namespace

extern const Kernels kernels_neon;
const Kernels kernels_neon = make_kernels("neon");

}  // namespace firstlm
