#include <immintrin.h>

#include "kernels.h"

namespace firstlm {
namespace {
#include "vec_avx512.h"
// After the vectors that they end in.
#include "bytes_avx512.h"
#include "dot_avx512.h"
// After the vectors that it is written over.
#include "kernels-inl.h"
}  // namespace

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = make_kernels("avx512");

}  // namespace firstlm
