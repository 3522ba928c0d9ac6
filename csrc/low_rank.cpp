#include "low_rank.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "arithmetic.h"
#include "dtype.h"

namespace firstlm {
namespace {

int64_t table_bytes(int64_t N) {
  const int64_t bytes = ceil_div(N, kPanelRows) * static_cast<int64_t>(sizeof(PanelColumns));
  return ceil_div(bytes, kLineBytes) * kLineBytes;
}

// The pairs of columns of a panel between its first and its last that is not zero.
PanelColumns columns_of(const float* B, int64_t N, int64_t R, int64_t panel) {
  int64_t first = R / 2, last = 0;
  for (int64_t n = panel * kPanelRows; n < std::min(N, (panel + 1) * kPanelRows); ++n) {
    for (int64_t r = 0; r < R; ++r) {
      if (B[n * R + r] == 0) continue;
      first = std::min(first, r / 2);
      last = std::max(last, r / 2 + 1);
    }
  }
  if (first >= last) first = last = 0;
  return {.line = 0,
          .first = static_cast<int32_t>(first),
          .pairs = static_cast<int32_t>(last - first),
          .unused = 0};
}

}  // namespace

int64_t packed_columns_bytes(const float* B, int64_t N, int64_t R) {
  int64_t bytes = table_bytes(N);
  for (int64_t p = 0; p < ceil_div(N, kPanelRows); ++p) {
    bytes += columns_of(B, N, R, p).pairs * kLineBytes;
  }
  return bytes;
}

void pack_columns(const float* B, int64_t N, int64_t R, std::byte* to) {
  std::memset(to, 0, packed_columns_bytes(B, N, R));
  int32_t line = static_cast<int32_t>(table_bytes(N) / kLineBytes);
  for (int64_t p = 0; p < ceil_div(N, kPanelRows); ++p) {
    PanelColumns columns = columns_of(B, N, R, p);
    columns.line = line;
    std::memcpy(to + p * sizeof columns, &columns, sizeof columns);
    for (int32_t i = 0; i < columns.pairs; ++i, ++line) {
      for (int64_t n = p * kPanelRows; n < std::min(N, (p + 1) * kPanelRows); ++n) {
        BFloat16 pair[2];
        for (int j = 0; j < 2; ++j) narrow(B[n * R + 2 * (columns.first + i) + j], pair + j);
        std::memcpy(to + line * kLineBytes + n % kPanelRows * sizeof pair, pair, sizeof pair);
      }
    }
  }
}

PackedColumns packed_columns(const std::byte* data, int64_t bytes, int64_t N, int64_t R) {
  const auto require = [](bool holds) {
    if (!holds) throw std::invalid_argument("is no packed B of these sizes");
  };
  int64_t line = table_bytes(N) / kLineBytes;
  require(bytes >= table_bytes(N));
  const PackedColumns B{N, bytes, data};
  for (int64_t p = 0; p < ceil_div(N, kPanelRows); ++p) {
    const PanelColumns columns = B.panel(p);
    require(columns.line == line && columns.first >= 0 && columns.pairs >= 0 &&
            2 * (int64_t{columns.first} + columns.pairs) <= R);
    line += columns.pairs;
  }
  require(bytes == line * kLineBytes);
  return B;
}

void add_columns(const Kernels& kernels, const PackedColumns& B, const float* z, int64_t stride_z,
                 int64_t M, int64_t first, int64_t last, float* y, int64_t stride_y) {
  kernels.add_columns({B, z, stride_z, M, first, last, y, stride_y});
}

}  // namespace firstlm
