// Products with packed weights against sums in double, on every instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "aligned_bytes.h"
#include "catch.h"
#include "linear.h"
#include "random_values.h"

namespace firstlm {
namespace {

constexpr Precision kPrecisions[] = {Precision::kFloat32, Precision::kBFloat16, Precision::kInt8,
                                     Precision::kInt4};

bool is_integer(Precision precision) { return group_size(precision) > 1; }

// An input as a product reads it, and what it may err by.
struct Input {
  double value, error;
};

struct Case {
  Precision precision;
  int64_t N, K, M, stride_M;
  std::vector<float> weights, x;
  AlignedBytes bytes;
  PackedMatrix matrix;

  Case(Precision precision, int64_t N, int64_t K, int64_t M, float scale = 1)
      : precision(precision),
        N(N),
        K(K),
        M(M),
        stride_M(K + 2),
        weights(random_values<float>(N * K, 1)),
        x(random_values<float>(M * stride_M, 2)),
        bytes(PackedMatrix{precision, N, K, nullptr}.bytes()),
        matrix{precision, N, K, bytes.data()} {
    for (float& value : x) value *= scale;
    pack_panels(matrix, DType::kFloat32, weights.data(), K, 0, matrix.panels(), bytes.data());
  }

  AlignedBytes prepared(const Kernels& kernels) const {
    AlignedBytes input(input_bytes(kernels, precision, M, K), std::byte{0x7f});
    const auto prepare = [&](int64_t first, int64_t last) {
      prepare_input(kernels, precision, x.data(), stride_M, M, K, first, last, input.data());
    };
    prepare(M / 3, M);  // as two threads would
    prepare(0, M / 3);
    return input;
  }

  // y [M, N + 3], the last columns left alone.
  std::vector<float> run(const Kernels& kernels, const std::vector<int64_t>& bounds) const {
    const AlignedBytes input = prepared(kernels);
    std::vector<float> y(M * (N + 3), 77);
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      multiply(kernels, matrix, input.data(), M, bounds[i], bounds[i + 1], y.data(), N + 3);
    }
    return y;
  }
  std::vector<float> run(const Kernels& kernels) const {
    return run(kernels, {0, matrix.panels()});
  }

  Input input(const Kernels& kernels, int64_t m, int64_t k) const {
    const float* row = &x[m * stride_M];
    if (precision == Precision::kBFloat16 && std::string(kernels.isa) == "avx512_bf16") {
      BFloat16 rounded;
      narrow(row[k], &rounded);
      return {widen(rounded), 0};
    }
    if (!is_integer(precision)) return {row[k], 0};
    const int64_t size = group_size(precision), begin = k / size * size;
    float greatest = 0;
    for (int64_t i = begin; i < std::min(begin + size, K); ++i) {
      greatest = std::max(greatest, std::abs(row[i]));
    }
    if (greatest == 0) return {0, 0};
    // Where the product is all but halfway between integers, either is right.
    const float inverse = 127 / greatest, scale = greatest / 127;
    const double exact = std::nearbyint(static_cast<double>(row[k]) * inverse);
    const double rounded = std::nearbyint(row[k] * inverse);
    return {scale * exact, scale * std::abs(exact - rounded)};
  }

  int64_t wrong_outputs(const Kernels& kernels, const std::vector<float>& y) const {
    std::vector<Input> inputs;
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t k = 0; k < K; ++k) inputs.push_back(input(kernels, m, k));
    }
    int64_t wrong = 0;
    for (int64_t n = 0; n < N; ++n) {
      std::vector<float> row(K);
      unpack_row(matrix, n, row.data());
      const double greatest = std::abs(*std::max_element(
          row.begin(), row.end(), [](float a, float b) { return std::abs(a) < std::abs(b); }));
      for (int64_t m = 0; m < M; ++m) {
        double expected = 0, magnitude = 0, error = 0;
        for (int64_t k = 0; k < K; ++k) {
          const Input& input = inputs[m * K + k];
          expected += row[k] * input.value;
          // int4 adds up steps and minima, each of which may be as large as the greatest weight.
          magnitude += std::abs(input.value) *
                       (precision == Precision::kInt4 ? 3 * greatest : std::abs(row[k]));
          error += std::abs(row[k]) * input.error;
        }
        const double allowed = (K + 8) * 0x1p-24 * magnitude + error;
        wrong += !(std::abs(y[m * (N + 3) + n] - expected) <= allowed);
      }
    }
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = N; n < N + 3; ++n) wrong += y[m * (N + 3) + n] != 77;
    }
    return wrong;
  }
};

TEST_CASE("products of packed weights are those of the unpacked ones") {
  for (const Kernels* kernels : available_kernels()) {
    std::mt19937 random(1);
    const auto draw = [&](int64_t first, int64_t last) {
      return std::uniform_int_distribution<int64_t>(first, last)(random);
    };
    for (const Precision precision : kPrecisions) {
      for (int64_t M = 1; M <= 40; ++M) {
        const int64_t N = draw(1, 100), K = M % 10 == 0 ? 1 : draw(1, 300);
        INFO(kernels->isa << ", precision " << int(precision) << ", N " << N << ", K " << K
                          << ", M " << M);
        const Case c(precision, N, K, M);
        CHECK(c.wrong_outputs(*kernels, c.run(*kernels)) == 0);
      }
    }
  }
}

TEST_CASE("neither the number of tokens nor the range of panels changes a bit of a product") {
  for (const Kernels* kernels : available_kernels()) {
    for (const Precision precision : kPrecisions) {
      for (const int64_t M : {2, 3, 5, 8, 13, 25, 300}) {
        const int64_t N = 71, K = 321;
        const Case c(precision, N, K, M);
        INFO(kernels->isa << ", precision " << int(precision) << ", M " << M);
        const std::vector<float> y = c.run(*kernels);
        CHECK(y == c.run(*kernels, {0, 1, 4, 5}));
        for (const int64_t m : {int64_t{0}, M / 2, M - 1}) {
          Case one(precision, N, K, 1);
          std::copy_n(&c.x[m * c.stride_M], K, one.x.begin());
          const std::vector<float> expected = one.run(*kernels);
          CHECK(std::memcmp(expected.data(), &y[m * (N + 3)], N * sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST_CASE("products of no tokens or of no panels write nothing") {
  for (const Kernels* kernels : available_kernels()) {
    for (const Precision precision : kPrecisions) {
      CHECK(input_bytes(*kernels, precision, 0, 100) == 0);
      CHECK(Case(precision, 20, 40, 0).run(*kernels).empty());
      for (const float y : Case(precision, 20, 40, 3).run(*kernels, {1, 1})) CHECK(y == 77);
    }
  }
}

TEST_CASE("products of finite inputs are finite, and those of zeros are zero") {
  for (const Kernels* kernels : available_kernels()) {
    for (const Precision precision : kPrecisions) {
      for (const float scale : {0.0f, 1e-44f, 1e-38f, 1e-20f, 1e20f, 1e35f}) {
        INFO(kernels->isa << ", precision " << int(precision) << ", scale " << scale);
        const Case c(precision, 33, 200, 3, scale);
        const std::vector<float> y = c.run(*kernels);
        int64_t wrong = 0;
        for (const float value : y) wrong += !std::isfinite(value);
        for (int64_t n = 0; n < c.N && scale == 0; ++n) wrong += y[n] != 0;
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("a token that is not finite has outputs that are not, and leaves the others alone") {
  for (const Kernels* kernels : available_kernels()) {
    for (const Precision precision : kPrecisions) {
      for (const float value : {NAN, INFINITY}) {
        INFO(kernels->isa << ", precision " << int(precision) << ", value " << value);
        Case c(precision, 20, 100, 3);
        const std::vector<float> before = c.run(*kernels);
        c.x[c.stride_M + 70] = value;
        const std::vector<float> y = c.run(*kernels);
        for (int64_t n = 0; n < c.N; ++n) {
          CHECK(y[n] == before[n]);
          CHECK(!std::isfinite(y[c.N + 3 + n]));
          CHECK(y[2 * (c.N + 3) + n] == before[2 * (c.N + 3) + n]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace firstlm
