#include <immintrin.h>

#include "kernels.h"

// Only what AVX512_BF16 changes; dispatch.cpp takes everything else from AVX-512 and VNNI.
namespace firstlm {
namespace {
#include "vec_avx512.h"
// After the vectors that they end in.
#include "bytes_avx512.h"
#include "dot_avx512.h"
// After all of these.
#include "linear-inl.h"
#include "vec_math-inl.h"
// After the functions that it calls.
#include "attention-inl.h"
// After the formats that they are one more of.
#include "attention_avx512_bf16.h"
#include "dot_avx512_bf16.h"
}  // namespace

extern const LinearKernels linear_bf16_avx512_bf16;
const LinearKernels linear_bf16_avx512_bf16 = make_linear<BFloat16PairLines>();

extern void (*const attend_bf16_avx512_bf16)(const AttentionSplit& split);
void (*const attend_bf16_avx512_bf16)(const AttentionSplit& split) = attend_in_pairs;

}  // namespace firstlm
