#include "kernels.h"

namespace firstlm {
namespace {
#include "vec_portable.h"
// After the vectors that they end in.
#include "dot_portable.h"
// After the vectors that it is written over.
#include "kernels-inl.h"
}  // namespace

extern const Kernels kernels_portable;
const Kernels kernels_portable = make_kernels("portable");

}  // namespace firstlm
