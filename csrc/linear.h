// Products with the weights of a model, packed for decoding: every precision in one layout.
// Letters: N outputs, K inputs, M tokens.
//
// Outputs are taken 16 side by side, as a panel. A panel is the scales of all its groups, then one
// 64-byte line after the other along K: 16 outputs x 1 (f32), 2 (bf16), 4 (int8) or 8 (int4)
// inputs. So a thread that works through its panels reads one sequential stream, whatever the
// precision, no lane has to be summed with another, and one layout fits every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "dtype.h"

namespace firstlm {

enum class Precision : int { kFloat32, kBFloat16, kInt8, kInt4 };
inline constexpr int kNumPrecisions = 4;

// Outputs of a panel.
inline constexpr int64_t kPanelRows = 16;

// Inputs that share a scale, and for int4 a minimum too: 1 where there are no scales. K is padded
// with zeros to whole groups.
constexpr int64_t group_size(Precision precision) {
  return precision == Precision::kInt8 ? 64 : precision == Precision::kInt4 ? 32 : 1;
}

// [N, K] packed. The data is 64-byte aligned and not owned.
struct PackedMatrix {
  Precision precision;
  int64_t N, K;
  const std::byte* data;

  int64_t panels() const { return (N + kPanelRows - 1) / kPanelRows; }
  int64_t panel_bytes() const;
  int64_t bytes() const { return panels() * panel_bytes(); }  // what one product reads
};

// Packs panels [first, last) of `weights` [N, K] (elements of a row contiguous, rows stride_N
// elements apart) to `to`, where the whole matrix begins. int8: symmetric, absolute maximum of the
// group; int4: minimum and step of the group, both f16, values 0 to 15.
void pack_panels(const PackedMatrix& shape, DType dtype, const void* weights, int64_t stride_N,
                 int64_t first, int64_t last, std::byte* to);

// Row n of the matrix -> to [K]: an embedding.
void unpack_row(const PackedMatrix& matrix, int64_t n, float* to);

// M tokens as the products of one precision read them: f32 as it is, bf16 rounded where the
// instruction set multiplies bf16 and f32 elsewhere, int8 per group with scale (and, for int4,
// sum). Bytes of M tokens of K inputs.
int64_t input_bytes(const Kernels& kernels, Precision precision, int64_t M, int64_t K);

// x [M, K] (rows stride_M apart) -> `to`, 64-byte aligned. Tokens [first, last) only, so that
// threads can share the work; all must be there before a product reads them.
void prepare_input(const Kernels& kernels, Precision precision, const float* x, int64_t stride_M,
                   int64_t M, int64_t K, int64_t first, int64_t last, std::byte* to);

// y[m * stride_y + n] = sum over k of W[n, k] x[m, k], for the outputs n < N of panels [first,
// last). Neither M nor the range changes a bit of the result.
void multiply(const Kernels& kernels, const PackedMatrix& matrix, const std::byte* input, int64_t M,
              int64_t first, int64_t last, float* y, int64_t stride_y);

}  // namespace firstlm
