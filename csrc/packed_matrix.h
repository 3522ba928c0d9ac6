// Weights of a linear layer, packed for products: every precision in one layout.
// Letters: N outputs, K inputs.
//
// Outputs are taken 16 side by side, as a panel. A panel is the scales of all its groups, then one
// 64-byte line after the other along K: 16 outputs x 1 (f32), 2 (bf16), 4 (int8) or 8 (int4)
// inputs. So a thread that works through its panels reads one sequential stream, whatever the
// precision, no lane has to be summed with another, and one layout fits every instruction set.
//
//   line    bytes [4r, 4r + 4) belong to output r of the panel: consecutive inputs; byte j of an
//           int4 line holds input j in its low and input j + 4 in its high four bits
//   scales  int8  f16 [groups][16]: w = scale q, q in [-127, 127]; padded to whole lines
//           int4  f16 [groups][2][16]: w = step q + minimum, q in [0, 15]
#pragma once

#include <cstddef>
#include <cstdint>

#include "arithmetic.h"
#include "dtype.h"

namespace firstlm {

enum class Precision : int { kFloat32, kBFloat16, kInt8, kInt4 };
inline constexpr int kNumPrecisions = 4;

// Outputs of a panel.
inline constexpr int64_t kPanelRows = 16;
inline constexpr int64_t kLineBytes = 64;

// Inputs that share a scale, and for int4 a minimum too: 1 where there are no scales. K is padded
// with zeros to whole groups and lines.
constexpr int64_t group_size(Precision precision) {
  return precision == Precision::kInt8 ? 64 : precision == Precision::kInt4 ? 32 : 1;
}

constexpr int64_t inputs_per_line(Precision precision) {
  return int64_t{1} << static_cast<int>(precision);
}

// Bytes of a panel's scales.
constexpr int64_t scale_bytes(Precision precision, int64_t K) {
  const int64_t values = precision == Precision::kInt8 ? 1 : precision == Precision::kInt4 ? 2 : 0;
  const int64_t bytes = ceil_div(K, group_size(precision)) * values * kPanelRows * 2;
  return ceil_div(bytes, kLineBytes) * kLineBytes;
}

constexpr int64_t lines_per_panel(Precision precision, int64_t K) {
  const int64_t padded_K = ceil_div(K, group_size(precision)) * group_size(precision);
  return ceil_div(padded_K, inputs_per_line(precision));
}

// [N, K] packed. The data is 64-byte aligned and not owned.
struct PackedMatrix {
  Precision precision;
  int64_t N, K;
  const std::byte* data;

  int64_t panels() const { return ceil_div(N, kPanelRows); }
  int64_t panel_bytes() const {
    return scale_bytes(precision, K) + lines_per_panel(precision, K) * kLineBytes;
  }
  int64_t bytes() const { return panels() * panel_bytes(); }  // what one product reads
};

// The columns of one panel of a matrix that is zero elsewhere; see low_rank.h.
struct PanelColumns {
  int32_t line;          // of the bytes, where its first line is
  int32_t first, pairs;  // pairs of columns
  int32_t unused;
};

// [N, R] packed, every panel with its own columns. The data is 64-byte aligned and not owned.
struct PackedColumns {
  int64_t N, bytes;
  const std::byte* data;

  PanelColumns panel(int64_t index) const {
    return reinterpret_cast<const PanelColumns*>(data)[index];
  }
};

// Packs panels [first, last) of `weights` [N, K] (elements of a row contiguous, rows stride_N
// elements apart) to `to`, where the whole matrix begins. int8: symmetric, absolute maximum of the
// group; int4: minimum and step of the group. Both are rounded to f16 before values are, so weights
// that have been dequantised from such groups (Q4_1 of GGUF) come back as they were. Finite weights
// beyond the range of f16 scales are clamped to it.
void pack_panels(const PackedMatrix& shape, DType dtype, const void* weights, int64_t stride_N,
                 int64_t first, int64_t last, std::byte* to);

// Row n of the matrix -> to [K]: an embedding.
void unpack_row(const PackedMatrix& matrix, int64_t n, float* to);

}  // namespace firstlm
