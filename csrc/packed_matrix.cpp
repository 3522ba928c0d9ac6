#include "packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace firstlm {
namespace {

constexpr int64_t kGroup = 64;  // inputs that are converted at once: the greatest group_size
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

// The places of one output of a panel: Byte is std::byte, const to be read.
template <class Byte>
struct PanelRow {
  Byte* panel;
  int64_t first_line;  // bytes of the scales
  int64_t row;

  Byte* scale(int64_t index) const { return panel + (index * kPanelRows + row) * 2; }
  Byte* word(int64_t line) const { return panel + first_line + line * kLineBytes + row * 4; }

  void set_scale(int64_t index, Float16 value) const { std::memcpy(scale(index), &value, 2); }
  void set_word(int64_t line, const void* four_bytes) const {
    std::memcpy(word(line), four_bytes, 4);
  }
  float get_scale(int64_t index) const {
    Float16 value;
    std::memcpy(&value, scale(index), 2);
    return widen(value);
  }
  void get_word(int64_t line, void* four_bytes) const { std::memcpy(four_bytes, word(line), 4); }
};
using To = PanelRow<std::byte>;
using From = PanelRow<const std::byte>;

// A code packs group g of a row, x [kGroup] of which n are weights and the others zeros, and gives
// back all of it.

struct Float32Code {
  static constexpr int64_t kGroup = firstlm::kGroup;

  static void pack(const float* x, int64_t n, int64_t g, const To& to) {
    for (int64_t i = 0; i < n; ++i) to.set_word(g * kGroup + i, x + i);
  }
  static void unpack(const From& from, int64_t n, int64_t g, float* x) {
    for (int64_t i = 0; i < n; ++i) from.get_word(g * kGroup + i, x + i);
  }
};

struct BFloat16Code {
  static constexpr int64_t kGroup = firstlm::kGroup;

  static void pack(const float* x, int64_t n, int64_t g, const To& to) {
    for (int64_t i = 0; i < n; i += 2) {
      BFloat16 pair[2];
      for (int j = 0; j < 2; ++j) narrow(x[i + j], pair + j);
      to.set_word((g * kGroup + i) / 2, pair);
    }
  }
  static void unpack(const From& from, int64_t n, int64_t g, float* x) {
    for (int64_t i = 0; i < n; i += 2) {
      BFloat16 pair[2];
      from.get_word((g * kGroup + i) / 2, pair);
      for (int j = 0; j < 2; ++j) x[i + j] = widen(pair[j]);
    }
  }
};

struct Int8Code {
  static constexpr int64_t kGroup = group_size(Precision::kInt8);

  static void pack(const float* x, int64_t n, int64_t g, const To& to) {
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
    for (int64_t i = 0; i < kGroup; i += 4) to.set_word((g * kGroup + i) / 4, values + i);
  }
  static void unpack(const From& from, int64_t, int64_t g, float* x) {
    const float scale = from.get_scale(g);
    for (int64_t i = 0; i < kGroup; i += 4) {
      int8_t word[4];
      from.get_word((g * kGroup + i) / 4, word);
      for (int j = 0; j < 4; ++j) x[i + j] = scale * word[j];
    }
  }
};

struct Int4Code {
  static constexpr int64_t kGroup = group_size(Precision::kInt4);

  static void pack(const float* x, int64_t n, int64_t g, const To& to) {
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
    for (int64_t i = 0; i < kGroup; i += 8) {
      uint8_t word[4];
      for (int j = 0; j < 4; ++j) word[j] = values[i + j] | values[i + 4 + j] << 4;
      to.set_word((g * kGroup + i) / 8, word);
    }
  }
  static void unpack(const From& from, int64_t, int64_t g, float* x) {
    const float step = from.get_scale(2 * g), minimum = from.get_scale(2 * g + 1);
    for (int64_t i = 0; i < kGroup; i += 8) {
      uint8_t word[4];
      from.get_word((g * kGroup + i) / 8, word);
      for (int j = 0; j < 8; ++j) {
        x[i + j] = step * static_cast<float>(j < 4 ? word[j] & 15 : word[j - 4] >> 4) + minimum;
      }
    }
  }
};

template <class Function>
void with_code(Precision precision, Function&& function) {
  switch (precision) {
    case Precision::kFloat32:
      return function(Float32Code{});
    case Precision::kBFloat16:
      return function(BFloat16Code{});
    case Precision::kInt8:
      return function(Int8Code{});
    case Precision::kInt4:
      return function(Int4Code{});
  }
}

template <class Code, class T>
void pack_row(const T* weights, int64_t K, const To& to) {
  for (int64_t g = 0; g * Code::kGroup < K; ++g) {
    const int64_t n = std::min(Code::kGroup, K - g * Code::kGroup);
    float x[kGroup];
    if (n < kGroup) std::fill(x + n, x + kGroup, 0.0f);
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(widen(weights[g * Code::kGroup + i]));
    Code::pack(x, n, g, to);
  }
}

}  // namespace

void pack_panels(const PackedMatrix& shape, DType dtype, const void* weights, int64_t stride_N,
                 int64_t first, int64_t last, std::byte* to) {
  const int64_t scales = scale_bytes(shape.precision, shape.K);
  const auto pack = [&](auto code, const auto* rows) {
    for (int64_t p = first; p < last; ++p) {
      std::byte* panel = to + p * shape.panel_bytes();
      const int64_t count = std::min(kPanelRows, shape.N - p * kPanelRows);
      // What belongs to no weight: rows beyond N, the padding of the scales.
      if (count < kPanelRows) std::memset(panel, 0, shape.panel_bytes());
      if (scales > 0) std::memset(panel + scales - kLineBytes, 0, kLineBytes);
      for (int64_t row = 0; row < count; ++row) {
        pack_row<decltype(code)>(rows + (p * kPanelRows + row) * stride_N, shape.K,
                                 {panel, scales, row});
      }
    }
  };
  with_element_type(dtype, [&](auto element) {
    with_code(shape.precision,
              [&](auto code) { pack(code, static_cast<const decltype(element)*>(weights)); });
  });
}

void unpack_row(const PackedMatrix& matrix, int64_t n, float* to) {
  const From from{matrix.data + n / kPanelRows * matrix.panel_bytes(),
                  scale_bytes(matrix.precision, matrix.K), n % kPanelRows};
  with_code(matrix.precision, [&](auto code) {
    constexpr int64_t kCodeGroup = decltype(code)::kGroup;
    for (int64_t g = 0; g * kCodeGroup < matrix.K; ++g) {
      const int64_t count = std::min(kCodeGroup, matrix.K - g * kCodeGroup);
      float x[kGroup];
      code.unpack(from, count, g, x);
      std::copy_n(x, count, to + g * kCodeGroup);
    }
  });
}

}  // namespace firstlm
