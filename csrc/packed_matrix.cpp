#include "packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace firstlm {
namespace {

constexpr int64_t kMaxGroup = 64;
constexpr float kGreatestFloat16 = 65504;
constexpr float kRoundingShift = 0x1.8p23f;  // added, it rounds small numbers to integers

// f16 nearest to x, which is not NaN; the greatest finite one for what lies beyond.
Float16 to_float16(float x) {
  Float16 half;
  narrow(std::clamp(x, -kGreatestFloat16, kGreatestFloat16), &half);
  return half;
}

// The step that divides `range` in `steps`, in f16. Rounding a step that f16 has few bits for could
// leave the end of the range more than half a step away: the next one is taken then.
Float16 to_step(float range, int steps) {
  Float16 step = to_float16(range / steps);
  const bool is_greatest = widen(step) == kGreatestFloat16;
  if (!is_greatest && range > (steps + 0.5f) * widen(step)) ++step.bits;
  return step;
}

struct Range {
  float min, max;
};

// Of x [n]. Several chains, which compilers make vectors of.
Range find_range(const float* x, int64_t n) {
  constexpr int kChains = 8;
  float min[kChains], max[kChains];
  for (int c = 0; c < kChains; ++c) min[c] = max[c] = x[0];
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains) {
    for (int c = 0; c < kChains; ++c) {
      min[c] = x[i + c] < min[c] ? x[i + c] : min[c];
      max[c] = x[i + c] > max[c] ? x[i + c] : max[c];
    }
  }
  for (; i < n; ++i) min[0] = std::min(min[0], x[i]), max[0] = std::max(max[0], x[i]);
  return {*std::min_element(min, min + kChains), *std::max_element(max, max + kChains)};
}

// The places of one output of a panel.
struct PanelRow {
  std::byte* panel;
  int64_t first_line;  // bytes of the scales
  int64_t row;

  void set_scale(int64_t index, Float16 scale) const {
    std::memcpy(panel + (index * kPanelRows + row) * 2, &scale, 2);
  }
  void set_word(int64_t line, const void* four_bytes) const {
    std::memcpy(panel + first_line + line * kLineBytes + row * 4, four_bytes, 4);
  }
};

// x [n], padded with values that are packed as zeros: group g of a row.
void pack_int8_group(const float* x, int64_t n, int64_t g, const PanelRow& to) {
  constexpr int64_t kGroup = group_size(Precision::kInt8);
  const Range range = find_range(x, n);
  const Float16 scale = to_step(std::max(-range.min, range.max), 127);
  const float inverse = scale.bits == 0 ? 0 : 1 / widen(scale);
  int8_t values[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) {
    float q = x[i] * inverse;
    q = q < 127.0f ? q : 127.0f;
    q = q > -127.0f ? q : -127.0f;
    values[i] = static_cast<int8_t>(static_cast<int>((q + kRoundingShift) - kRoundingShift));
  }
  to.set_scale(g, scale);
  for (int64_t i = 0; i < kGroup / 4; ++i) to.set_word(g * (kGroup / 4) + i, values + 4 * i);
}

void pack_int4_group(const float* x, int64_t n, int64_t g, const PanelRow& to) {
  constexpr int64_t kGroup = group_size(Precision::kInt4);
  const Range range = find_range(x, n);
  const Float16 minimum = to_float16(range.min);
  const Float16 step = to_step(std::max(0.0f, range.max - widen(minimum)), 15);
  const float offset = widen(minimum), inverse = step.bits == 0 ? 0 : 1 / widen(step);
  uint8_t values[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) {
    float q = (x[i] - offset) * inverse + 0.5f;
    q = q < 15.0f ? q : 15.0f;
    q = q > 0.0f ? q : 0.0f;
    values[i] = static_cast<uint8_t>(static_cast<int>(q));
  }
  to.set_scale(2 * g, step);
  to.set_scale(2 * g + 1, minimum);
  for (int64_t i = 0; i < kGroup / 8; ++i) {
    uint8_t word[4];
    for (int j = 0; j < 4; ++j) word[j] = values[8 * i + j] | values[8 * i + 4 + j] << 4;
    to.set_word(g * (kGroup / 8) + i, word);
  }
}

// Some consecutive inputs, the group of an integer precision or any others: x [n].
void pack_group(Precision precision, const float* x, int64_t n, int64_t g, const PanelRow& to) {
  switch (precision) {
    case Precision::kFloat32:
      for (int64_t i = 0; i < n; ++i) to.set_word(g * kMaxGroup + i, x + i);
      return;
    case Precision::kBFloat16:
      for (int64_t i = 0; i < n; i += 2) {
        BFloat16 pair[2];
        for (int j = 0; j < 2; ++j) narrow(x[i + j], pair + j);
        to.set_word((g * kMaxGroup + i) / 2, pair);
      }
      return;
    case Precision::kInt8:
      return pack_int8_group(x, n, g, to);
    case Precision::kInt4:
      return pack_int4_group(x, n, g, to);
  }
}

template <class T>
void pack_row(const PackedMatrix& shape, const T* weights, const PanelRow& to) {
  const int64_t group = group_size(shape.precision) == 1 ? kMaxGroup : group_size(shape.precision);
  for (int64_t g = 0; g * group < shape.K; ++g) {
    const int64_t n = std::min(group, shape.K - g * group);
    float x[kMaxGroup];
    if (n < kMaxGroup) std::fill(x + n, x + kMaxGroup, 0.0f);
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(widen(weights[g * group + i]));
    pack_group(shape.precision, x, n, g, to);
  }
}

}  // namespace

void pack_panels(const PackedMatrix& shape, DType dtype, const void* weights, int64_t stride_N,
                 int64_t first, int64_t last, std::byte* to) {
  with_element_type(dtype, [&](auto element) {
    const auto* rows = static_cast<const decltype(element)*>(weights);
    for (int64_t p = first; p < last; ++p) {
      std::byte* panel = to + p * shape.panel_bytes();
      const int64_t count = std::min(kPanelRows, shape.N - p * kPanelRows);
      const int64_t lines = scale_bytes(shape.precision, shape.K);
      // What belongs to no weight: rows beyond N, the padding of the scales.
      if (count < kPanelRows) std::memset(panel, 0, shape.panel_bytes());
      if (lines > 0) std::memset(panel + lines - kLineBytes, 0, kLineBytes);
      for (int64_t row = 0; row < count; ++row) {
        pack_row(shape, rows + (p * kPanelRows + row) * stride_N, {panel, lines, row});
      }
    }
  });
}

void unpack_row(const PackedMatrix& matrix, int64_t n, float* to) {
  const std::byte* panel = matrix.data + n / kPanelRows * matrix.panel_bytes();
  const int64_t row = n % kPanelRows;
  const std::byte* words = panel + scale_bytes(matrix.precision, matrix.K) + row * 4;
  const auto scale = [&](int64_t index) {
    Float16 half;
    std::memcpy(&half, panel + (index * kPanelRows + row) * 2, 2);
    return widen(half);
  };
  const int64_t per_line = inputs_per_line(matrix.precision);
  const int64_t group = group_size(matrix.precision);
  for (int64_t k = 0; k < matrix.K; ++k) {
    const std::byte* word = words + k / per_line * kLineBytes;
    const int64_t i = k % per_line, g = k / group;
    switch (matrix.precision) {
      case Precision::kFloat32:
        std::memcpy(to + k, word, 4);
        break;
      case Precision::kBFloat16: {
        BFloat16 half;
        std::memcpy(&half, word + 2 * i, 2);
        to[k] = widen(half);
        break;
      }
      case Precision::kInt8:
        to[k] = scale(g) * static_cast<float>(static_cast<int8_t>(word[i]));
        break;
      case Precision::kInt4: {
        const int byte = static_cast<int>(word[i % 4]);
        to[k] = scale(2 * g) * static_cast<float>(i < 4 ? byte & 15 : byte >> 4) + scale(2 * g + 1);
        break;
      }
    }
  }
}

}  // namespace firstlm
