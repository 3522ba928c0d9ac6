#include <immintrin.h>

#include "kernels.h"

// Only what VNNI changes; dispatch.cpp takes everything else from AVX-512.
namespace firstlm {
namespace {
#include "vec_avx512.h"
// After the vectors that they end in.
#include "bytes_avx512.h"
#include "dot_avx512_vnni.h"
// After all of these.
#include "linear-inl.h"
}  // namespace

extern const LinearKernels linear_int8_avx512_vnni, linear_int4_avx512_vnni;
const LinearKernels linear_int8_avx512_vnni = make_linear<Int8Groups>();
const LinearKernels linear_int4_avx512_vnni = make_linear<Int4Groups>();

}  // namespace firstlm
