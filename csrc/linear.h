// Products with packed weights. Letters: N outputs, K inputs, M tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "packed_matrix.h"

namespace firstlm {

// M tokens as the products of one precision read them: f32 as it is, bf16 rounded where the
// instruction set multiplies bf16 and f32 elsewhere, int8 and int4 per group as int8 with scale.
// Bytes of M tokens of K inputs.
int64_t input_bytes(const Kernels& kernels, Precision precision, int64_t M, int64_t K);

// x [M, K] (rows stride_M apart) -> `to`, 64-byte aligned. Tokens [first, last) only, so that
// threads can share the work; all must be there before a product reads them.
void prepare_input(const Kernels& kernels, Precision precision, const float* x, int64_t stride_M,
                   int64_t M, int64_t K, int64_t first, int64_t last, std::byte* to);

// y[m * stride_y + n] = sum over k of W[n, k] x[m, k], for the outputs n < N of panels [first,
// last). Neither M nor the range changes a bit of the result. Panels are taken two at a time:
// ranges of an even number of panels are the fastest.
void multiply(const Kernels& kernels, const PackedMatrix& matrix, const std::byte* input, int64_t M,
              int64_t first, int64_t last, float* y, int64_t stride_y);

}  // namespace firstlm
