#include <immintrin.h>

#include "kernels.h"

namespace firstlm {
namespace {
#include "vec_avx2.h"
// After the vectors that they end in.
#include "dot_avx2.h"
// After the vectors that it is written over.
#include "kernels-inl.h"
}  // namespace

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = make_kernels("avx2");

}  // namespace firstlm
