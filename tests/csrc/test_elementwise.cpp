// Norm, rotation and activation against plain lines in double, on every instruction set.
#include <cmath>
#include <limits>
#include <vector>

#include "catch.h"
#include "elementwise.h"
#include "random_values.h"

namespace firstlm {
namespace {

constexpr double kEps = 0x1p-23;

// Elements that differ from `expected` by more than `ulps` units in the last place.
int64_t wrong_elements(const std::vector<float>& actual, const std::vector<double>& expected,
                       double ulps, double absolute = 1e-35) {
  int64_t wrong = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double allowed = ulps * kEps * std::abs(expected[i]) + absolute;
    wrong += !(std::abs(actual[i] - expected[i]) <= allowed);
  }
  return wrong;
}

TEST_CASE("elementwise: RMSNorm") {
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t n : {1, 3, 15, 16, 17, 64, 577, 2048, 4099}) {
      for (const float size : {1e-12f, 1.0f, 1e4f}) {
        INFO(kernels->isa << ", n " << n << ", size " << size);
        std::vector<float> x = random_values<float>(n, n), weight = random_values<float>(n, 2);
        for (float& value : x) value *= size;
        const double eps = 1e-5;
        double squares = 0;
        for (const float value : x) squares += static_cast<double>(value) * value;
        std::vector<double> expected(n);
        for (int64_t i = 0; i < n; ++i) {
          expected[i] = x[i] / std::sqrt(squares / n + eps) * weight[i];
        }
        std::vector<float> to(n + 1, 7);
        rms_norm(*kernels, x.data(), weight.data(), n, eps, to.data());
        CHECK(wrong_elements(to, expected, 8 + std::sqrt(n / 8.0)) == 0);
        CHECK(to[n] == 7);
        rms_norm(*kernels, x.data(), weight.data(), n, eps, x.data());
        to.pop_back();
        CHECK(x == to);
      }
    }
    std::vector<float> zeros(33, 0), to(33, 7);
    rms_norm(*kernels, zeros.data(), to.data(), 33, 1e-6, to.data());
    CHECK(to == zeros);
  }
}

TEST_CASE("elementwise: angles of positions are those of float32, their cosines those of double") {
  for (const double scaling : {1.0, 1.2079}) {
    const std::vector<float> frequencies = {1, 0.70710678f, 0.1f, 1.0e-4f};
    const Rope rope(frequencies, scaling);
    CHECK(rope.rotated_dim() == 8);
    for (const int64_t position : {0, 1, 7, 4095, 131071, 1000000}) {
      std::vector<float> cos(4), sin(4);
      rope.angles(position, cos.data(), sin.data());
      std::vector<double> expected_cos, expected_sin;
      for (const float frequency : frequencies) {
        const float angle = static_cast<float>(position) * frequency;
        expected_cos.push_back(std::cos(static_cast<double>(angle)) * scaling);
        expected_sin.push_back(std::sin(static_cast<double>(angle)) * scaling);
      }
      CHECK(wrong_elements(cos, expected_cos, 2) == 0);
      CHECK(wrong_elements(sin, expected_sin, 2) == 0);
    }
  }
}

TEST_CASE("elementwise: rotation") {
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t half : {0, 1, 7, 16, 20, 32, 40, 64, 65}) {
      INFO(kernels->isa << ", half " << half);
      const std::vector<float> cos = random_values<float>(half, 1);
      const std::vector<float> sin = random_values<float>(half, 2);
      const std::vector<float> before = random_values<float>(2 * half + 3, 3);
      std::vector<float> head = before;
      rotate(*kernels, cos.data(), sin.data(), half, head.data());
      for (int64_t i = 0; i < half; ++i) {
        const double a = before[i], b = before[half + i], c = cos[i], s = sin[i];
        CHECK(std::abs(head[i] - (a * c - b * s)) <= kEps * (std::abs(a * c) + std::abs(b * s)));
        CHECK(std::abs(head[half + i] - (b * c + a * s)) <=
              kEps * (std::abs(b * c) + std::abs(a * s)));
      }
      for (int64_t i = 2 * half; i < 2 * half + 3; ++i) CHECK(head[i] == before[i]);
    }
  }
}

// gate and up [I], in blocks of kGateBlock one after the other.
std::vector<float> interleaved(const std::vector<float>& gate, const std::vector<float>& up) {
  std::vector<float> both;
  for (size_t i = 0; i < gate.size(); i += kGateBlock) {
    both.insert(both.end(), gate.begin() + i, gate.begin() + i + kGateBlock);
    both.insert(both.end(), up.begin() + i, up.begin() + i + kGateBlock);
  }
  return both;
}

TEST_CASE("elementwise: silu of the gates times the ups") {
  const std::vector<float> extremes = {0,     -0.0f,  1e-30f, -1e-30f, 20,   -20,   87,    -87,
                                       88.5f, -88.5f, 100,    -100,    1e4f, -1e4f, 1e38f, -1e38f};
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t I : {0, 16, 48, 4096}) {
      for (const float size : {0.1f, 1.0f, 8.0f, 40.0f}) {
        INFO(kernels->isa << ", I " << I << ", size " << size);
        std::vector<float> gate = random_values<float>(I, I + 1), up = random_values<float>(I, 2);
        for (float& value : gate) value *= size;
        for (int64_t i = 0; I == 48 && i < 16; ++i) gate[16 + i] = extremes[i];
        for (int64_t i = 0; I == 48 && i < 16; ++i) up[16 + i] = 1;
        std::vector<double> expected(I);
        for (int64_t i = 0; i < I; ++i) {
          expected[i] = gate[i] / (1 + std::exp(-static_cast<double>(gate[i]))) * up[i];
        }
        std::vector<float> to(I + 1, 7);
        silu_and_multiply(*kernels, interleaved(gate, up).data(), I, to.data());
        CHECK(wrong_elements(to, expected, 6) == 0);
        CHECK(to[I] == 7);
      }
    }
    std::vector<float> gate(16, std::numeric_limits<float>::infinity()), up(16, 2), to(16);
    gate[3] = NAN;
    silu_and_multiply(*kernels, interleaved(gate, up).data(), 16, to.data());
    CHECK(to[0] == gate[0]);
    CHECK(std::isnan(to[3]));
  }
}

}  // namespace
}  // namespace firstlm
