// What a LoRA adapter adds to a product of packed weights, kept apart from them: y += B (A x).
// Weights on a coarse grid would round the adapter away. Letters: N outputs, K inputs, R the rank,
// M tokens.
//
// Weights of several modules that share their inputs are one matrix, and so are their adapters: the
// rows of A [R, K] lie one module after the other, and a row of B [N, R] is zero but for the
// columns of its module. So every panel of B has the columns that it needs, and only these are
// read:
//
//   i32 [panels][4]: {first line, first pair of columns, pairs, 0} | padding to whole lines
//   lines of 64 bytes, panel by panel: 16 outputs x 2 columns in bf16, as in a PackedMatrix
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "packed_matrix.h"

namespace firstlm {

// Bytes of B [N, R], f32 rows R apart, R even.
int64_t packed_columns_bytes(const float* B, int64_t N, int64_t R);

// B -> `to`, as many bytes as packed_columns_bytes says.
void pack_columns(const float* B, int64_t N, int64_t R, std::byte* to);

// Throws std::invalid_argument unless `bytes` at `data` are B of N outputs and at most R columns.
PackedColumns packed_columns(const std::byte* data, int64_t bytes, int64_t N, int64_t R);

struct LowRank {
  PackedMatrix A{};   // [R, K]
  PackedColumns B{};  // [N, R]

  int64_t R() const { return A.N; }                                     // 0: there is none
  int64_t bytes() const { return R() == 0 ? 0 : A.bytes() + B.bytes; }  // what one product reads
};

// y[m * stride_y + n] += sum over r of B[n, r] z[m * stride_z + r], for the outputs n < N of panels
// [first, last). Neither M nor the range changes a bit of the result.
void add_columns(const Kernels& kernels, const PackedColumns& B, const float* z, int64_t stride_z,
                 int64_t M, int64_t first, int64_t last, float* y, int64_t stride_y);

}  // namespace firstlm
