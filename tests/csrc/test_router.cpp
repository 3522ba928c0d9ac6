// The core's router scoring against a few lines in double, on every instruction set.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "catch.h"
#include "router.h"

namespace firstlm {
namespace {

const Pooling kPoolings[] = {{PoolKind::kMean, 1},
                             {PoolKind::kLast, 1},
                             {PoolKind::kWindowedMean, 1},
                             {PoolKind::kWindowedMean, 3},
                             {PoolKind::kWindowedMean, 8}};

struct Case {
  int64_t B, T, D;
  std::vector<float> hidden;  // [B, T, D]
  std::vector<char> mask;     // [B, T]
  int64_t F(Pooling pooling) const { return pooling.W() * D; }
  const bool* mask_data() const { return reinterpret_cast<const bool*>(mask.data()); }
  HiddenStates states() const { return {hidden.data(), DType::kFloat32, B, T, D, T * D, D}; }
};

Case random_case(int64_t B, int64_t T, int64_t D, double prompt_share, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::bernoulli_distribution is_prompt(prompt_share);
  Case c{B, T, D, std::vector<float>(B * T * D), std::vector<char>(B * T)};
  for (float& x : c.hidden) x = normal(random);
  for (char& m : c.mask) m = is_prompt(random);
  return c;
}

std::vector<Case> cases() {
  return {random_case(1, 1, 1, 1, 0),    random_case(0, 5, 4, 1, 1),
          random_case(3, 0, 5, 1, 2),    random_case(2, 9, 17, 0, 3),
          random_case(4, 30, 33, .3, 4), random_case(2, 50, 1500, .6, 5),
          random_case(1, 257, 96, 1, 6), random_case(3, 400, 300, .9, 7)};
}

// weights[b][f / D][t]: what token t weighs in the features of row b.
double weight_of_token(const Case& c, Pooling pooling, int64_t b, int64_t w, int64_t t) {
  int64_t n = 0, rank = 0;
  for (int64_t i = 0; i < c.T; ++i) {
    if (i == t) rank = n;
    n += c.mask[b * c.T + i];
  }
  if (!c.mask[b * c.T + t]) return 0;
  const TokenRange range = pooled_range(pooling, w, n);
  return rank >= range.begin && rank < range.end ? 1.0 / (range.end - range.begin) : 0;
}

TEST_CASE("ranges of windows follow one another, cover all tokens and are never empty") {
  for (int64_t n = 1; n < 40; ++n) {
    for (int64_t W = 1; W < 12; ++W) {
      const Pooling pooling{PoolKind::kWindowedMean, W};
      INFO("n " << n << ", W " << W);
      int64_t covered = 0;
      for (int64_t w = 0; w < W; ++w) {
        const TokenRange range = pooled_range(pooling, w, n);
        CHECK(range.begin < range.end);
        CHECK(range.begin <= covered);
        CHECK(range.end >= covered);
        if (n >= W) CHECK(range.begin == covered);
        covered = range.end;
      }
      CHECK(covered == n);
    }
  }
}

TEST_CASE("the windows of a token are those whose range holds it") {
  for (const Pooling pooling : kPoolings) {
    for (int64_t n = 1; n < 40; ++n) {
      for (int64_t rank = 0; rank < n; ++rank) {
        const WindowRange windows = windows_of(pooling, rank, n);
        for (int64_t w = 0; w < pooling.W(); ++w) {
          const TokenRange range = pooled_range(pooling, w, n);
          REQUIRE((w >= windows.begin && w < windows.end) ==
                  (rank >= range.begin && rank < range.end));
        }
      }
    }
  }
}

std::vector<float> pool(const Kernels& kernels, const Case& c, Pooling pooling, int threads) {
  std::vector<float> pooled(c.B * c.F(pooling), NAN);
  std::vector<float> scratch(scratch_elements(c.states(), pooling, threads), NAN);
  router_pool(kernels, c.states(), c.mask_data(), pooling, threads, scratch.data(), pooled.data());
  return pooled;
}

TEST_CASE("pooled features are the weighted sums of the prompt's tokens") {
  for (const Kernels* kernels : available_kernels()) {
    for (const Case& c : cases()) {
      for (const Pooling pooling : kPoolings) {
        for (const int threads : {1, 3}) {
          INFO(kernels->isa << ", B " << c.B << ", T " << c.T << ", D " << c.D << ", W "
                            << pooling.W() << ", threads " << threads);
          const std::vector<float> pooled = pool(*kernels, c, pooling, threads);
          int wrong = 0;
          for (int64_t b = 0; b < c.B; ++b) {
            for (int64_t w = 0; w < pooling.W(); ++w) {
              std::vector<double> weights(c.T);
              for (int64_t t = 0; t < c.T; ++t) weights[t] = weight_of_token(c, pooling, b, w, t);
              for (int64_t d = 0; d < c.D; ++d) {
                double expected = 0, magnitude = 0;
                for (int64_t t = 0; t < c.T; ++t) {
                  const double term = weights[t] * c.hidden[(b * c.T + t) * c.D + d];
                  expected += term;
                  magnitude += std::abs(term);
                }
                const double actual = pooled[b * c.F(pooling) + w * c.D + d];
                wrong += !(std::abs(actual - expected) <= (c.T + 8) * 1.2e-7 * magnitude);
              }
            }
          }
          CHECK(wrong == 0);
        }
      }
    }
  }
}

// The prompt tokens of a case, one sequence after the other.
struct Packed {
  std::vector<float> hidden;     // [N, D]
  std::vector<int64_t> offsets;  // [B + 1]
  int64_t D;

  explicit Packed(const Case& c) : offsets{0}, D(c.D) {
    for (int64_t b = 0; b < c.B; ++b) {
      for (int64_t t = 0; t < c.T; ++t) {
        const auto token = c.hidden.begin() + (b * c.T + t) * D;
        if (c.mask[b * c.T + t]) hidden.insert(hidden.end(), token, token + D);
      }
      offsets.push_back(static_cast<int64_t>(hidden.size()) / D);
    }
  }

  PackedStates states() const {
    const auto B = static_cast<int64_t>(offsets.size()) - 1;
    return {hidden.data(), DType::kFloat32, offsets.back(), D, B, D, offsets.data()};
  }

  std::vector<float> pool(Pooling pooling, int threads) const {
    std::vector<float> pooled((offsets.size() - 1) * pooling.W() * D, NAN);
    std::vector<float> scratch(scratch_elements(states(), pooling, threads), NAN);
    router_pool_packed(kernels(), states(), pooling, threads, scratch.data(), pooled.data());
    return pooled;
  }
};

// Rows [first, first + count) of a batch.
Case rows_of(const Case& c, int64_t first, int64_t count) {
  const auto hidden = c.hidden.begin() + first * c.T * c.D;
  const auto mask = c.mask.begin() + first * c.T;
  return {count, c.T, c.D, {hidden, hidden + count * c.T * c.D}, {mask, mask + count * c.T}};
}

TEST_CASE("neither threads nor the batch change a bit of sums over several blocks of tokens") {
  for (const int64_t T : {129, 1025, 1500}) {
    for (const double prompt_share : {1.0, .8}) {
      const Case c = random_case(3, T, 577, prompt_share, 8);
      const Packed packed(c);
      for (const Pooling pooling : kPoolings) {
        INFO("T " << T << ", share " << prompt_share << ", W " << pooling.W());
        const std::vector<float> expected = pool(kernels(), c, pooling, 1);
        for (const int threads : {2, 3, 4, 16}) {
          INFO("threads " << threads);
          CHECK(pool(kernels(), c, pooling, threads) == expected);
          CHECK(packed.pool(pooling, threads) == expected);
          std::vector<float> one_by_one;
          for (int64_t b = 0; b < c.B; ++b) {
            const std::vector<float> row = pool(kernels(), rows_of(c, b, 1), pooling, threads);
            one_by_one.insert(one_by_one.end(), row.begin(), row.end());
          }
          CHECK(one_by_one == expected);
        }
      }
    }
  }
}

TEST_CASE("packed prompts give the bits of padded ones, forward and backward") {
  for (const Case& c : cases()) {
    const Packed packed(c);
    for (const Pooling pooling : kPoolings) {
      INFO("B " << c.B << ", T " << c.T << ", D " << c.D << ", W " << pooling.W());
      CHECK(packed.pool(pooling, 2) == pool(kernels(), c, pooling, 2));

      const Case g = random_case(c.B, 1, c.F(pooling), 1, 11);
      std::vector<float> grad(packed.hidden.size(), NAN), padded_grad(c.hidden.size());
      router_pool_packed_backward(packed.states(), pooling, g.hidden.data(), 2, grad.data());
      router_pool_backward(c.states(), c.mask_data(), pooling, g.hidden.data(), 2,
                           padded_grad.data());
      Case of_grad = c;
      of_grad.hidden = padded_grad;
      CHECK(grad == Packed(of_grad).hidden);
    }
  }
}

TEST_CASE("the backward pass is the adjoint: <pool(x), g> = <x, backward(g)>") {
  for (const Case& c : cases()) {
    for (const Pooling pooling : kPoolings) {
      INFO("B " << c.B << ", T " << c.T << ", D " << c.D << ", W " << pooling.W());
      const Case g = random_case(c.B, 1, c.F(pooling), 1, 11);
      const std::vector<float> pooled = pool(kernels(), c, pooling, 2);
      std::vector<float> grad(c.hidden.size(), NAN);
      router_pool_backward(c.states(), c.mask_data(), pooling, g.hidden.data(), 2, grad.data());
      double forward = 0, backward = 0, magnitude = 0;
      for (size_t i = 0; i < pooled.size(); ++i) {
        forward += static_cast<double>(pooled[i]) * g.hidden[i];
        magnitude += std::abs(static_cast<double>(pooled[i]) * g.hidden[i]);
      }
      for (size_t i = 0; i < grad.size(); ++i) {
        backward += static_cast<double>(grad[i]) * c.hidden[i];
      }
      CHECK(std::abs(forward - backward) <= (c.T + 8) * 1.2e-7 * magnitude);
    }
  }
}

template <class T>
void check_head(const Kernels& kernels, int64_t B, int64_t F, int64_t H, bool is_linear,
                double norm_eps, const Case& random) {
  std::vector<T> values(random.hidden.begin(), random.hidden.end());
  const T* pooled = values.data();
  const RouterHead<T> head{F,
                           H,
                           pooled + B * F,
                           pooled + B * F + H * F,
                           is_linear ? nullptr : pooled + B * F + H * F + H,
                           is_linear ? nullptr : pooled + B * F + H * F + 2 * H,
                           norm_eps};
  std::vector<T> units(B * H), logit(B, NAN);
  router_head(kernels, head, pooled, B, 2, units.data(), logit.data());
  for (int64_t b = 0; b < B; ++b) {
    double squares = 0, expected = 0, magnitude = 0;
    for (int64_t f = 0; f < F; ++f) squares += std::pow(pooled[b * F + f], 2);
    const double scale = norm_eps > 0 ? 1 / std::sqrt(squares / F + norm_eps) : 1;
    for (int64_t h = 0; h < H; ++h) {
      double unit = head.bias[h], unit_magnitude = std::abs(unit);
      for (int64_t f = 0; f < F; ++f) {
        const double term = scale * pooled[b * F + f] * head.weight[h * F + f];
        unit += term;
        unit_magnitude += std::abs(term);
      }
      const double out = is_linear ? 1 : static_cast<double>(head.out_weight[h]);
      expected += is_linear ? unit : out * unit / (1 + std::exp(-unit));
      magnitude += std::abs(out) * unit_magnitude;
    }
    if (!is_linear) expected += head.out_bias[0];
    const double tolerance = (F + H + 8) * std::numeric_limits<T>::epsilon() * (magnitude + 1);
    CHECK(std::abs(logit[b] - expected) <= tolerance);
  }
}

TEST_CASE("logits are those of the head's formula") {
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t F : {1, 30, 577}) {
      for (const int64_t H : {1, 5, 16, 40}) {
        for (const double norm_eps : {0.0, 1e-6}) {
          INFO(kernels->isa << ", F " << F << ", H " << H << ", norm_eps " << norm_eps);
          const Case random = random_case(1, 1, 3 * F + H * F + 2 * H + 1, 1, 21);
          check_head<float>(*kernels, 3, F, H, false, norm_eps, random);
          check_head<double>(*kernels, 3, F, H, false, norm_eps, random);
          if (H == 1) check_head<float>(*kernels, 3, F, H, true, norm_eps, random);
          if (H == 1) check_head<double>(*kernels, 3, F, H, true, norm_eps, random);
        }
      }
    }
  }
}

}  // namespace
}  // namespace firstlm
