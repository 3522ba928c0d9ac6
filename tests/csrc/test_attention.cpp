// Decode attention against a few lines in double, on every instruction set.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "attention.h"
#include "catch.h"
#include "random_values.h"

namespace firstlm {
namespace {

// Slots of a cache that keeps heads apart, or side by side as [R, C, H, D].
template <class T>
struct Case {
  DType dtype;
  int64_t R, Hq, H, C, D;
  bool heads_inside;
  std::vector<int64_t> begin, end;
  double soft_cap;
  std::vector<T> query, keys, values;

  Case(DType dtype, int64_t Hq, int64_t H, int64_t C, int64_t D, bool heads_inside,
       std::vector<int64_t> begin, std::vector<int64_t> end, double soft_cap)
      : dtype(dtype),
        R(begin.size()),
        Hq(Hq),
        H(H),
        C(C),
        D(D),
        heads_inside(heads_inside),
        begin(begin),
        end(end),
        soft_cap(soft_cap),
        query(random_values<T>(R * Hq * D, 1)),
        keys(random_values<T>(R * H * C * D, 2)),
        values(random_values<T>(R * H * C * D, 3)) {}

  double scale() const { return 1 / std::sqrt(static_cast<double>(D)); }

  CacheView view(const std::vector<T>& cache) const {
    return {cache.data(), H * C * D, heads_inside ? D : C * D, heads_inside ? H * D : D};
  }

  double element(const std::vector<T>& cache, int64_t r, int64_t h, int64_t c, int64_t d) const {
    const CacheView strides = view(cache);
    return widen(cache[r * strides.stride_R + h * strides.stride_H + c * strides.stride_C + d]);
  }

  std::vector<T> run(const Kernels& kernels, int threads) const {
    const DecodeAttention attention{dtype,      R,          Hq,           H,
                                    C,          D,          query.data(), Hq * D,
                                    D,          view(keys), view(values), begin.data(),
                                    end.data(), scale(),    soft_cap};
    std::vector<Accumulator<T>> scratch(scratch_elements(attention), NAN);
    std::vector<T> output(R * Hq * D);
    for (T& x : output) narrow(static_cast<Accumulator<T>>(NAN), &x);
    decode_attention(kernels, attention, threads, scratch.data(), output.data());
    return output;
  }

  // weights [end - begin] of query head h of row r, and what a score may err by.
  std::vector<double> weights(int64_t r, int64_t h, double* error) const {
    std::vector<double> weights;
    double greatest = -std::numeric_limits<double>::infinity(), terms = 0, total = 0;
    for (int64_t c = begin[r]; c < end[r]; ++c) {
      double score = 0, magnitude = 0;
      for (int64_t d = 0; d < D; ++d) {
        const double term =
            scale() * widen(query[(r * Hq + h) * D + d]) * element(keys, r, h / (Hq / H), c, d);
        score += term;
        magnitude += std::abs(term);
      }
      if (soft_cap > 0) score = soft_cap * std::tanh(score / soft_cap);
      weights.push_back(score);
      greatest = std::max(greatest, score);
      terms = std::max(terms, magnitude);
    }
    for (double& weight : weights) total += weight = std::exp(weight - greatest);
    for (double& weight : weights) weight /= total;
    *error = 2 * (std::sqrt(D) + 8) * terms;
    return weights;
  }

  int64_t wrong_elements(const std::vector<T>& output, double output_eps) const {
    const double eps = std::numeric_limits<Accumulator<T>>::epsilon();
    int64_t wrong = 0;
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t h = 0; h < Hq; ++h) {
        double error;
        const std::vector<double> weights = this->weights(r, h, &error);
        error += std::sqrt(weights.size()) + 16;
        for (int64_t d = 0; d < D; ++d) {
          double expected = 0, magnitude = 0;
          for (size_t i = 0; i < weights.size(); ++i) {
            const double term = weights[i] * element(values, r, h / (Hq / H), begin[r] + i, d);
            expected += term;
            magnitude += std::abs(term);
          }
          const double actual = widen(output[(r * Hq + h) * D + d]);
          const double allowed = eps * error * magnitude + output_eps / 2 * std::abs(expected);
          wrong += !(std::abs(actual - expected) <= allowed * (1 + output_eps) + output_eps * 1e-5);
        }
      }
    }
    return wrong;
  }
};

template <class T>
void check_attention(DType dtype, double output_eps) {
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t D : {1, 32, 80, 100, 128}) {
      for (const int64_t G : {1, 2, 3, 4, 7, 17}) {
        for (const double soft_cap : {0.0, 2.0}) {
          const int64_t H = 2, C = 600;
          const bool heads_inside = G % 2 == 0;
          const Case<T> c(dtype, G * H, H, C, D, heads_inside, {0, 7, 5, 599, 250, 0},
                          {600, 7, 6, 600, 511, 3}, soft_cap);
          INFO(kernels->isa << ", D " << D << ", G " << G << ", soft cap " << soft_cap);
          const std::vector<T> output = c.run(*kernels, 1);
          CHECK(c.wrong_elements(output, output_eps) == 0);
          for (int64_t i = G * H * D; i < 2 * G * H * D; ++i) {
            if (widen(output[i]) != 0) FAIL("a row that sees nothing is not zero");
          }
          if (D != 128) continue;  // enough bytes for two threads in every type
          const std::vector<T> again = c.run(*kernels, 2);
          for (size_t i = 0; i < output.size(); ++i) {
            if (widen(output[i]) != widen(again[i])) FAIL("threads change the result");
          }
        }
      }
    }
  }
}

TEST_CASE("attention over float32") { check_attention<float>(DType::kFloat32, 0x1p-23); }
TEST_CASE("attention over float64") { check_attention<double>(DType::kFloat64, 0x1p-52); }
TEST_CASE("attention over bfloat16") { check_attention<BFloat16>(DType::kBFloat16, 0x1p-7); }
TEST_CASE("attention over float16") { check_attention<Float16>(DType::kFloat16, 0x1p-10); }

TEST_CASE("a row whose slots lie outside the cache is found") {
  const std::vector<int64_t> begin = {0, 5, -1, 3, 0}, end = {0, 5, 2, 2, 6};
  const auto misfit = [&](int64_t r) { return find_misfit(&begin[r], &end[r], 1, 5) == 0; };
  CHECK(find_misfit(begin.data(), end.data(), 5, 5) == 2);
  CHECK_FALSE(misfit(0));
  CHECK_FALSE(misfit(1));
  CHECK(misfit(2));
  CHECK(misfit(3));
  CHECK(misfit(4));
}

}  // namespace
}  // namespace firstlm
