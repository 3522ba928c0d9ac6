// Packed weights against the weights that they were made of.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "aligned_bytes.h"
#include "catch.h"
#include "packed_matrix.h"
#include "random_values.h"

namespace firstlm {
namespace {

constexpr Precision kPrecisions[] = {Precision::kFloat32, Precision::kBFloat16, Precision::kInt8,
                                     Precision::kInt4};

template <class T>
AlignedBytes pack(PackedMatrix& matrix, DType dtype, const std::vector<T>& weights,
                  int64_t stride_N) {
  AlignedBytes bytes(matrix.bytes(), std::byte{77});
  matrix.data = bytes.data();
  // In two parts, as two threads would.
  const int64_t half = matrix.panels() / 2;
  pack_panels(matrix, dtype, weights.data(), stride_N, half, matrix.panels(), bytes.data());
  pack_panels(matrix, dtype, weights.data(), stride_N, 0, half, bytes.data());
  return bytes;
}

std::vector<float> pack_and_unpack(Precision precision, const std::vector<float>& row) {
  PackedMatrix matrix{precision, 1, static_cast<int64_t>(row.size()), nullptr};
  const AlignedBytes bytes = pack(matrix, DType::kFloat32, row, matrix.K);
  std::vector<float> result(row.size());
  unpack_row(matrix, 0, result.data());
  return result;
}

// What a value of a group may differ by: half a step, and what rounding its scales to f16 costs.
double allowed_error(Precision precision, const std::vector<double>& group) {
  const auto [min, max] = std::minmax_element(group.begin(), group.end());
  const double greatest = std::max(std::abs(*min), std::abs(*max));
  const double half = 0x1p-11, least_half = 0x1p-24;  // f16: relative, and between subnormals
  switch (precision) {
    case Precision::kFloat32:
      return 0;
    case Precision::kBFloat16:
      return greatest * 0x1p-8;
    case Precision::kInt8:
      return greatest / 254 * (1 + half) + least_half;
    default:
      return (*max - *min) / 30 * (1 + half) + (greatest + (*max - *min)) * half + 3 * least_half;
  }
}

template <class T>
void check_round_trip(DType dtype) {
  std::mt19937 random(1);
  const auto draw = [&](int64_t first, int64_t last) {
    return std::uniform_int_distribution<int64_t>(first, last)(random);
  };
  for (const Precision precision : kPrecisions) {
    for (int round = 0; round < 12; ++round) {
      PackedMatrix matrix{precision, draw(1, 70), round == 0 ? 1 : draw(1, 200), nullptr};
      const int64_t stride_N = matrix.K + draw(0, 3);
      const std::vector<T> weights = random_values<T>(matrix.N * stride_N, round);
      INFO("precision " << int(precision) << ", N " << matrix.N << ", K " << matrix.K);
      const AlignedBytes bytes = pack(matrix, dtype, weights, stride_N);
      const int64_t size = std::max<int64_t>(group_size(precision), 1);
      int64_t wrong = 0;
      for (int64_t n = 0; n < matrix.N; ++n) {
        std::vector<float> row(matrix.K + 1, 77);
        unpack_row(matrix, n, row.data());
        CHECK(row[matrix.K] == 77);
        for (int64_t begin = 0; begin < matrix.K; begin += size) {
          std::vector<double> group;
          for (int64_t k = begin; k < std::min(begin + size, matrix.K); ++k) {
            group.push_back(widen(weights[n * stride_N + k]));
          }
          const double allowed = allowed_error(precision, group);
          for (size_t i = 0; i < group.size(); ++i) {
            wrong += !(std::abs(row[begin + i] - group[i]) <= allowed);
          }
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("packed matrices of float32 weights unpack to them") {
  check_round_trip<float>(DType::kFloat32);
}
TEST_CASE("packed matrices of bfloat16 weights unpack to them") {
  check_round_trip<BFloat16>(DType::kBFloat16);
}
TEST_CASE("packed matrices of float16 weights unpack to them") {
  check_round_trip<Float16>(DType::kFloat16);
}

TEST_CASE("int4: weights that were dequantised from f16 steps and minima come back as they were") {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> draw(0, 15);
  for (const float scale : {1e-4f, 0.02f, 1.0f, 100.0f}) {
    std::vector<float> row;
    for (int g = 0; g < 50; ++g) {
      Float16 step, minimum;
      narrow(scale * (1 + 0.03f * g), &step);
      narrow(-scale * (7 + 0.1f * (g % 9)), &minimum);
      for (int i = 0; i < 32; ++i) {
        const int q = i == 5 ? 0 : i == 17 ? 15 : draw(random);
        row.push_back(widen(step) * static_cast<float>(q) + widen(minimum));
      }
    }
    CHECK(pack_and_unpack(Precision::kInt4, row) == row);
  }
}

TEST_CASE("int8: multiples of an f16 scale come back as they were") {
  std::vector<float> row;
  for (int i = 0; i < 64; ++i) row.push_back(static_cast<float>(i * 4 - 127) * 0x1.5p-9f);
  CHECK(pack_and_unpack(Precision::kInt8, row) == row);
}

TEST_CASE("a group of one value unpacks to it") {
  for (const float x : {0.0f, 0.5f, -0.5f, 96.0f}) {
    for (const Precision precision : kPrecisions) {
      const std::vector<float> row(64, x);
      INFO("precision " << int(precision) << ", value " << x);
      for (const float y : pack_and_unpack(precision, row)) {
        CHECK(std::abs(y - x) <= std::abs(x) * 0x1p-10f);
      }
    }
  }
}

TEST_CASE("finite weights stay finite, however large or small") {
  for (const float scale : {1e30f, 1e7f, 3e-5f, 1e-6f, 3e-8f, 1e-30f, 1e-44f}) {
    std::vector<float> row = random_values<float>(128, 3);
    for (float& x : row) x *= scale;
    for (const Precision precision : kPrecisions) {
      INFO("precision " << int(precision) << ", scale " << scale);
      const std::vector<float> unpacked = pack_and_unpack(precision, row);
      for (size_t i = 0; i < row.size(); ++i) {
        if (!std::isfinite(unpacked[i])) FAIL(row[i] << " became " << unpacked[i]);
        // Steps of f16 end at 2^-24.
        if (scale < 1 && !(std::abs(unpacked[i] - row[i]) <= 0.3f * scale + 0x1p-24f)) {
          FAIL(row[i] << " became " << unpacked[i]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace firstlm
