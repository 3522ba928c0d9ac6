// Prefill attention against a few lines in double, on every instruction set.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include "attention.h"
#include "catch.h"
#include "prefill_attention.h"
#include "random_values.h"

namespace firstlm {
namespace {

struct Shape {
  int64_t T, H, G, D, first_slot, begin, window;
  int64_t Hq() const { return H * G; }
  int64_t C() const { return first_slot + T + 3; }
  int64_t stride_T() const { return Hq() * D + 5; }
};

// One sequence; what no token may read is NaN.
template <class T>
struct Case {
  DType dtype;
  Shape shape;
  double scale;
  std::vector<float> query;
  std::vector<T> keys, values;

  Case(DType dtype, const Shape& shape, double scale)
      : dtype(dtype),
        shape(shape),
        scale(scale),
        query(random_values<float>(shape.T * shape.stride_T(), 1)),
        keys(random_values<T>(shape.H * shape.C() * shape.D, 2)),
        values(random_values<T>(shape.H * shape.C() * shape.D, 3)) {
    for (int64_t h = 0; h < shape.H; ++h) {
      for (int64_t c = 0; c < shape.C(); ++c) {
        if (shape.begin <= c && c < shape.first_slot + shape.T) continue;
        for (int64_t d = 0; d < shape.D; ++d) {
          narrow(NAN, &keys[(h * shape.C() + c) * shape.D + d]);
          narrow(NAN, &values[(h * shape.C() + c) * shape.D + d]);
        }
      }
    }
  }

  PrefillAttention attention() const {
    return {dtype,
            shape.T,
            shape.Hq(),
            shape.H,
            shape.D,
            query.data(),
            shape.stride_T(),
            keys.data(),
            values.data(),
            shape.C() * shape.D,
            shape.first_slot,
            shape.begin,
            shape.window,
            scale};
  }

  // Tokens in calls of at most `at_once`, each by a team of `size`.
  std::vector<float> run(const Kernels& kernels, int size, int64_t at_once) const {
    std::vector<float> output(shape.T * shape.stride_T(), 7);
    for (int64_t t = 0; t < shape.T; t += at_once) {
      PrefillAttention part = attention();
      part.T = std::min(at_once, shape.T - t);
      part.query += t * shape.stride_T();
      part.first_slot += t;
      for (int rank = 0; rank < size; ++rank) {
        std::vector<float> scratch(prefill_attention_scratch(part) / sizeof(float), NAN);
        prefill_attention(kernels, part, {rank, size}, reinterpret_cast<std::byte*>(scratch.data()),
                          output.data() + t * shape.stride_T());
      }
    }
    return output;
  }

  double key(int64_t h, int64_t c, int64_t d) const {
    return widen(keys[(h * shape.C() + c) * shape.D + d]);
  }
  double value(int64_t h, int64_t c, int64_t d) const {
    return widen(values[(h * shape.C() + c) * shape.D + d]);
  }

  int64_t first_seen(int64_t t) const {
    const int64_t last = shape.first_slot + t;
    return shape.window > 0 ? std::max(shape.begin, last - shape.window + 1) : shape.begin;
  }

  // weights of the slots that token t sees, and what a score may err by.
  std::vector<double> weights(int64_t t, int64_t h, double* error) const {
    std::vector<double> weights;
    double greatest = -INFINITY, terms = 0, total = 0;
    for (int64_t c = first_seen(t); c <= shape.first_slot + t; ++c) {
      double score = 0, magnitude = 0;
      for (int64_t d = 0; d < shape.D; ++d) {
        const double q = query[t * shape.stride_T() + h * shape.D + d];
        const double term = scale * q * key(h / shape.G, c, d);
        score += term;
        magnitude += std::abs(term);
      }
      weights.push_back(score);
      greatest = std::max(greatest, score);
      terms = std::max(terms, magnitude);
    }
    for (double& weight : weights) total += weight = std::exp(weight - greatest);
    for (double& weight : weights) weight /= total;
    *error = 2 * (std::sqrt(shape.D) + 8) * terms;
    return weights;
  }

  // An element may err by eps of f32 x what its terms add up to x (error of a score + sqrt(slots)
  // for the sum + a constant for exp and the division).
  int64_t wrong_elements(const std::vector<float>& output) const {
    int64_t wrong = 0;
    for (int64_t t = 0; t < shape.T; ++t) {
      for (int64_t h = 0; h < shape.Hq(); ++h) {
        double error;
        const std::vector<double> weights = this->weights(t, h, &error);
        error += std::sqrt(weights.size()) + 16;
        for (int64_t d = 0; d < shape.D; ++d) {
          double expected = 0, magnitude = 0;
          for (size_t i = 0; i < weights.size(); ++i) {
            const double term = weights[i] * value(h / shape.G, first_seen(t) + i, d);
            expected += term;
            magnitude += std::abs(term);
          }
          const double actual = output[t * shape.stride_T() + h * shape.D + d];
          wrong += !(std::abs(actual - expected) <= 0x1p-23 * error * magnitude + 1e-30);
        }
      }
    }
    return wrong;
  }

  int64_t overwritten_elements(const std::vector<float>& output) const {
    int64_t overwritten = 0;
    for (int64_t t = 0; t < shape.T; ++t) {
      for (int64_t i = shape.Hq() * shape.D; i < shape.stride_T(); ++i) {
        overwritten += output[t * shape.stride_T() + i] != 7;
      }
    }
    return overwritten;
  }

  void check(std::mt19937& random) const {
    INFO("T " << shape.T << ", H " << shape.H << ", G " << shape.G << ", D " << shape.D
              << ", first slot " << shape.first_slot << ", begin " << shape.begin << ", window "
              << shape.window << ", scale " << scale);
    for (const Kernels* kernels : available_kernels()) {
      INFO(kernels->isa);
      const std::vector<float> output = run(*kernels, 1, shape.T);
      CHECK(wrong_elements(output) == 0);
      CHECK(overwritten_elements(output) == 0);
      const int size = 2 + random() % 9;
      INFO("team of " << size);
      CHECK((run(*kernels, size, shape.T) == output));
      const int64_t at_once = 1 + random() % shape.T;
      INFO(at_once << " tokens at once");
      CHECK((run(*kernels, 1 + random() % 3, at_once) == output));
    }
  }
};

Shape drawn_shape(std::mt19937& random) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  const int64_t T[] = {1, 2, 3, 17, 64, 95, 150, 230};
  const int64_t D[] = {8, 16, 20, 32, 64, 80, 100, 128, 256};
  const int64_t G[] = {1, 2, 3, 4, 5, 7, 16};
  Shape shape{T[below(8)], 1 + below(3), G[below(7)], D[below(9)], 0, 0, 0};
  if (below(2)) shape.first_slot = below(300);
  if (below(2)) shape.begin = below(shape.first_slot + 1);
  if (below(2)) shape.window = 1 + below(shape.first_slot + shape.T + 20);
  return shape;
}

template <class T>
void check_drawn_shapes(DType dtype) {
  std::mt19937 random(5);
  for (int i = 0; i < 60; ++i) {
    const Shape shape = drawn_shape(random);
    Case<T>(dtype, shape, 1 / std::sqrt(double(shape.D))).check(random);
  }
}

TEST_CASE("prefill attention over float32") { check_drawn_shapes<float>(DType::kFloat32); }
TEST_CASE("prefill attention over bfloat16") { check_drawn_shapes<BFloat16>(DType::kBFloat16); }
TEST_CASE("prefill attention over float16") { check_drawn_shapes<Float16>(DType::kFloat16); }

TEST_CASE("prefill attention of windows that hide all but the token itself") {
  std::mt19937 random(6);
  const Shape shape{130, 1, 3, 40, 11, 2, 1};
  const Case<float> c(DType::kFloat32, shape, 1);
  c.check(random);
  const std::vector<float> output = c.run(kernels(), 1, shape.T);
  for (int64_t t = 0; t < shape.T; ++t) {
    for (int64_t d = 0; d < shape.D; ++d) {
      if (output[t * shape.stride_T() + d] != float(c.value(0, shape.first_slot + t, d))) {
        FAIL("token " << t << " sees others");
      }
    }
  }
}

TEST_CASE("prefill attention of scores as large as ten thousand") {
  std::mt19937 random(7);
  Case<float>(DType::kFloat32, {140, 2, 3, 64, 30, 0, 0}, 1e3).check(random);
  Case<float>(DType::kFloat32, {140, 2, 3, 64, 30, 0, 9}, -1e3).check(random);
}

TEST_CASE("prefill attention of equal keys and values") {
  std::mt19937 random(8);
  Case<float> c(DType::kFloat32, {200, 1, 4, 24, 0, 0, 0}, 1);
  for (int64_t i = 0; i < 200 * 24; ++i) c.keys[i] = 1, c.values[i] = 3;
  c.check(random);
}

TEST_CASE("prefill attention of teams larger than the work") {
  std::mt19937 random(9);
  const Case<float> c(DType::kFloat32, {2, 1, 1, 8, 0, 0, 0}, 1);
  CHECK((c.run(kernels(), 64, 2) == c.run(kernels(), 1, 2)));
}

TEST_CASE("prefill attention of no tokens writes nothing") {
  PrefillAttention attention{};
  attention.Hq = attention.H = 1;
  attention.D = 8;
  prefill_attention(kernels(), attention, {0, 1}, nullptr, nullptr);
}

TEST_CASE("prefill attention of one token is decode attention") {
  for (const int64_t slots : {1, 95, 96, 97, 700}) {
    for (const int64_t D : {24, 64, 128}) {
      const Shape shape{1, 2, 3, D, slots - 1, 0, 0};
      const Case<float> c(DType::kFloat32, shape, 1 / std::sqrt(double(D)));
      const int64_t begin = 0, C = shape.C();
      const CacheView keys{c.keys.data(), 2 * C * D, C * D, D};
      const CacheView values{c.values.data(), 2 * C * D, C * D, D};
      const DecodeAttention decode{
          DType::kFloat32, 1,      6,      2,       C, D, c.query.data(), shape.stride_T(), D, keys,
          values,          &begin, &slots, c.scale, 0};
      for (const Kernels* kernels : available_kernels()) {
        INFO(kernels->isa << ", " << slots << " slots, D " << D);
        std::vector<float> scratch(scratch_elements(decode)), expected(6 * D);
        decode_attention(*kernels, decode, 1, scratch.data(), expected.data());
        const std::vector<float> output = c.run(*kernels, 1, 1);
        int64_t wrong = 0;
        for (int64_t i = 0; i < 6 * D; ++i) wrong += !(std::abs(output[i] - expected[i]) <= 2e-5);
        CHECK(wrong == 0);
        CHECK(c.wrong_elements(expected) == 0);
      }
    }
  }
}

}  // namespace
}  // namespace firstlm
