// Packed weights as torch tensors of bytes.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "../linear.h"
#include "../low_rank.h"

namespace firstlm {

// "float32", "bfloat16", "int8" or "int4"; ValueError for any other name.
Precision parse_precision(const std::string& name);

int64_t packed_bytes(const std::string& precision, int64_t N, int64_t K);

// weights [N, K] (f32, bf16, f16 or f64; elements of a row contiguous) -> uint8 [packed bytes], in
// `out` if given.
at::Tensor pack(const at::Tensor& weights, const std::string& precision, int num_threads,
                const std::optional<at::Tensor>& out);

// Its inverse, to within the precision: f32 [N, K].
at::Tensor unpack(const at::Tensor& packed, const std::string& precision, int64_t N, int64_t K);

// B [N, R] of an adapter, f32, R even -> uint8; see low_rank.h.
at::Tensor pack_columns(const at::Tensor& B);

// The tensor's bytes as a matrix. ValueError if their number or alignment does not fit; `name` is
// for the message.
PackedMatrix packed_matrix(const std::string& name, const at::Tensor& packed, Precision precision,
                           int64_t N, int64_t K);

// An adapter of a matrix [N, K] of some precision: A [R, K] packed as float32 beside float32, else
// as bfloat16, R a multiple of 16; B of pack_columns. Errors as packed_matrix.
LowRank packed_low_rank(const std::string& name, const at::Tensor& A, const at::Tensor& B,
                        const PackedMatrix& beside);

}  // namespace firstlm
