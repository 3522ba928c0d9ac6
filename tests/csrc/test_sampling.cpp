// Sampling against the rules of transformers' logits processors, written out in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>
#include <vector>

#include "catch.h"
#include "random_values.h"
#include "sampling.h"

namespace firstlm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<double> softmax(const std::vector<double>& logits) {
  const double greatest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p(logits.size());
  double total = 0;
  for (size_t i = 0; i < p.size(); ++i) total += p[i] = std::exp(logits[i] - greatest);
  for (double& x : p) x /= total;
  return p;
}

std::vector<double> reference(const SamplingSettings& settings, const std::vector<float>& raw,
                              const std::set<int64_t>& seen) {
  const int64_t V = raw.size();
  std::vector<double> x(V);
  for (int64_t i = 0; i < V; ++i) {
    // In float32: whether two logits are equal is decided there.
    float logit = raw[i];
    const auto penalty = static_cast<float>(settings.repetition_penalty);
    if (seen.count(i)) logit = logit < 0 ? logit * penalty : logit / penalty;
    x[i] = logit / static_cast<float>(settings.temperature);
  }
  if (settings.top_k > 0) {
    std::vector<double> sorted = x;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const double kth = sorted[std::min(settings.top_k, V) - 1];
    for (double& logit : x) logit = logit < kth ? -kInfinity : logit;
  }
  if (settings.top_p < 1) {
    std::vector<int64_t> ascending(V);
    std::iota(ascending.begin(), ascending.end(), 0);
    std::stable_sort(ascending.begin(), ascending.end(),
                     [&](int64_t a, int64_t b) { return x[a] < x[b]; });
    const std::vector<double> p = softmax(x);
    double sum = 0;
    for (int64_t i = 0; i < V - 1; ++i) {
      sum += p[ascending[i]];
      if (static_cast<float>(sum) <= static_cast<float>(1 - settings.top_p)) {
        x[ascending[i]] = -kInfinity;
      }
    }
  }
  const std::vector<double> p = softmax(x);
  const double greatest = *std::max_element(p.begin(), p.end());
  for (int64_t i = 0; i < V; ++i) {
    if (p[i] < settings.min_p * greatest) x[i] = -kInfinity;
  }
  return softmax(x);
}

std::vector<float> probabilities(const SamplingSettings& settings, std::vector<float> logits,
                                 const std::set<int64_t>& seen = {},
                                 const Kernels& kernels = firstlm::kernels()) {
  Sampler sampler(settings, logits.size(), kernels);
  for (const int64_t token : seen) sampler.note(token);
  std::vector<float> p(logits.size(), NAN);
  sampler.probabilities(logits.data(), p.data());
  return p;
}

int64_t wrong_elements(const std::vector<float>& actual, const std::vector<double>& expected) {
  int64_t wrong = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    wrong += !(std::abs(actual[i] - expected[i]) <= 1e-6);
    wrong += expected[i] == 0 && actual[i] != 0;
    wrong += expected[i] > 1e-36 && actual[i] == 0;
  }
  return wrong;
}

int64_t sample(const SamplingSettings& settings, std::vector<float> logits) {
  return Sampler(settings, logits.size()).sample(logits.data());
}

TEST_CASE("sampling: probabilities are those of the rules") {
  std::mt19937 random(1);
  const auto one_of = [&](std::vector<double> values) { return values[random() % values.size()]; };
  for (int drawn = 0; drawn < 300; ++drawn) {
    SamplingSettings settings;
    const auto V = static_cast<int64_t>(one_of({1, 2, 5, 255, 256, 257, 1000, 3001}));
    settings.temperature = one_of({0.1, 0.7, 1, 1.5, 30});
    settings.top_k = static_cast<int64_t>(one_of({0, 0, 1, 3, 50, 800, 5000}));
    settings.top_p = one_of({1, 1, 0.999, 0.95, 0.9, 0.5, 0.1, 1e-9, 0});
    settings.min_p = one_of({0, 0, 0.01, 0.1, 0.5, 1});
    settings.repetition_penalty = one_of({1, 1.1, 2, 0.8});
    std::vector<float> logits = random_values<float>(V, drawn);
    const float spread = one_of({0.1, 2, 10});
    for (float& logit : logits) logit *= spread;
    if (drawn % 4 == 0) {
      for (size_t i = 0; i + 1 < logits.size(); ++i) {
        if (random() % 2) logits[i] = -kInfinity;
      }
    }
    std::set<int64_t> seen;
    for (int64_t i = 0; i < V / 3; ++i) seen.insert(random() % V);
    const std::vector<double> expected = reference(settings, logits, seen);
    for (const Kernels* kernels : available_kernels()) {
      INFO(kernels->isa << ", V " << V << ", temperature " << settings.temperature << ", top_k "
                        << settings.top_k << ", top_p " << settings.top_p << ", min_p "
                        << settings.min_p << ", penalty " << settings.repetition_penalty);
      CHECK(wrong_elements(probabilities(settings, logits, seen, *kernels), expected) == 0);
    }
  }
}

TEST_CASE("sampling: equal logits") {
  SamplingSettings settings;
  settings.temperature = 1;
  std::vector<float> logits(700, 0);
  for (int i = 0; i < 8; ++i) logits[90 * i] = 40;  // alone: the others weigh nothing
  for (const int64_t top_k : {0, 1, 3, 8, 9, 700}) {
    for (const double top_p : {1.0, 0.875, 0.75, 0.5, 0.25, 0.125, 0.01}) {
      for (const double min_p : {0.0, 1.0}) {
        settings.top_k = top_k;
        settings.top_p = top_p;
        settings.min_p = min_p;
        INFO("top_k " << top_k << ", top_p " << top_p << ", min_p " << min_p);
        const std::vector<float> actual = probabilities(settings, logits);
        // Top-k keeps all equal ones; top-p keeps those of the greatest index, as the last of a
        // stable sort.
        const int kept = std::max(1, static_cast<int>(8 * top_p));
        for (int i = 0; i < 8; ++i) {
          CHECK(std::abs(actual[90 * i] - (i >= 8 - kept ? 1.0 / kept : 0)) < 1e-6);
        }
        CHECK(std::abs(std::accumulate(actual.begin(), actual.end(), 0.0) - 1) < 1e-6);
      }
    }
  }
  settings = {};
  CHECK(sample(settings, logits) == 0);
  logits[0] = 39;
  CHECK(sample(settings, logits) == 90);
}

TEST_CASE("sampling: a single token that is not impossible is taken") {
  for (const int64_t V : {1, 2, 256, 300, 1000}) {
    std::vector<float> logits(V, -kInfinity);
    logits[V / 2] = -3;
    for (const double temperature : {0.0, 0.01, 1.0, 1e6}) {
      for (const double top_p : {1.0, 0.5, 0.0}) {
        for (const int64_t top_k : {0, 1, 10, 2000}) {
          const SamplingSettings settings{temperature, top_k, top_p, 0.1, 1.3, 7};
          CHECK(sample(settings, logits) == V / 2);
          CHECK(probabilities(settings, logits)[V / 2] == 1);
        }
      }
    }
  }
}

TEST_CASE("sampling: greedy takes the greatest after the penalty") {
  std::vector<float> logits = random_values<float>(1000, 1);
  logits[700] = 6;
  logits[3] = 5.5;
  Sampler sampler({}, 1000);
  sampler.note(700);  // no penalty
  CHECK(sampler.sample(std::vector<float>(logits).data()) == 700);

  SamplingSettings settings;
  settings.repetition_penalty = 1.2;
  Sampler penalized(settings, 1000);
  penalized.note(700);
  penalized.note(700);   // once is enough
  penalized.note(1000);  // not in this vocabulary
  CHECK(penalized.sample(std::vector<float>(logits).data()) == 3);
  CHECK_THROWS_AS(penalized.note(-1), std::invalid_argument);

  logits[999] = kInfinity;
  CHECK(sampler.sample(logits.data()) == 999);
  std::vector<float> nothing(1000, -kInfinity);
  CHECK(sampler.sample(nothing.data()) == 0);
}

TEST_CASE("sampling: draws follow the probabilities") {
  for (const SamplingSettings& settings :
       {SamplingSettings{1, 0, 1, 0, 1, 1}, SamplingSettings{1, 20, 1, 0, 1, 2},
        SamplingSettings{1.3, 40, 0.9, 0, 1, 3}, SamplingSettings{0.8, 0, 0.95, 0.02, 1, 4}}) {
    const int64_t V = 600, draws = 40000;
    std::vector<float> logits = random_values<float>(V, 5);
    for (float& logit : logits) logit *= 2;
    const std::vector<float> p = probabilities(settings, logits);
    Sampler sampler(settings, V);
    std::vector<int64_t> counts(V);
    for (int64_t i = 0; i < draws; ++i) {
      std::vector<float> copy = logits;
      ++counts[sampler.sample(copy.data())];
    }
    // Chi-square, tokens of fewer than 5 expected draws together.
    double statistic = 0, rest = 0, rest_counts = 0;
    int freedom = -1;
    const auto add = [&](double expected, double counted) {
      statistic += (counted - expected) * (counted - expected) / expected;
      ++freedom;
    };
    for (int64_t i = 0; i < V; ++i) {
      if (p[i] == 0) CHECK(counts[i] == 0);
      if (p[i] * draws >= 5) {
        add(p[i] * draws, counts[i]);
      } else {
        rest += p[i] * draws;
        rest_counts += counts[i];
      }
    }
    if (rest >= 5) add(rest, rest_counts);
    CHECK(freedom >= 5);
    CHECK(statistic < freedom + 4 * std::sqrt(2.0 * freedom));
  }
}

TEST_CASE("sampling: a seed gives the same draws everywhere") {
  // Weights 1, 2, 4, 1: eighths, so that a draw is known from the first three bits.
  const std::vector<float> logits = {0, std::log(2.0f), std::log(4.0f), 0};
  Sampler sampler({1, 0, 1, 0, 1, 5489}, 4);
  std::mt19937_64 bits(5489);
  for (int i = 0; i < 1000; ++i) {
    std::vector<float> copy = logits;
    const int64_t expected[] = {0, 1, 1, 2, 2, 2, 2, 3};
    REQUIRE(sampler.sample(copy.data()) == expected[bits() >> 61]);
  }
}

TEST_CASE("sampling: logits that are no numbers are named") {
  for (const double temperature : {0.0, 1.0}) {
    for (const int64_t at : {0, 5, 255, 256, 320, 321}) {
      for (const Kernels* kernels : available_kernels()) {
        std::vector<float> logits = random_values<float>(322, 1);
        logits[at] = NAN;
        Sampler sampler({temperature, 5, 0.9, 0, 1, 1}, 322, *kernels);
        CHECK_THROWS_WITH(sampler.sample(logits.data()),
                          "the logit of token " + std::to_string(at) + " is NaN");
      }
    }
  }
  const SamplingSettings settings{1, 0, 1, 0, 1, 1};
  CHECK_THROWS_AS(sample(settings, {1, kInfinity}), std::runtime_error);
  CHECK_THROWS_AS(sample(settings, {-kInfinity, -kInfinity}), std::runtime_error);
}

TEST_CASE("sampling: settings that are refused") {
  const auto refused = [](double temperature, int64_t top_k, double top_p, double min_p,
                          double penalty) {
    CHECK_THROWS_AS((SamplingSettings{temperature, top_k, top_p, min_p, penalty, 0}.check()),
                    std::invalid_argument);
  };
  CHECK_NOTHROW(SamplingSettings{}.check());
  for (const double wrong : {-1.0, static_cast<double>(NAN), HUGE_VAL, 1e-60}) {
    refused(wrong, 0, 1, 0, 1);
    refused(1, 0, 1, 0, wrong);
  }
  for (const double wrong : {-0.1, 1.1, static_cast<double>(NAN)}) {
    refused(1, 0, wrong, 0, 1);
    refused(1, 0, 1, wrong, 1);
  }
  refused(1, -1, 1, 0, 1);
  refused(1, 0, 1, 0, 0);
  CHECK_THROWS_AS(Sampler({}, 0), std::invalid_argument);
  CHECK_THROWS_AS(Sampler({-1, 0, 1, 0, 1, 0}, 10), std::invalid_argument);
}

TEST_CASE("sampling: maximum and exponentials of every width") {
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t n : {0, 1, 7, 8, 15, 16, 31, 32, 33, 64, 100, 257}) {
      INFO(kernels->isa << ", n " << n);
      std::vector<float> x = random_values<float>(n, n);
      for (float& value : x) value *= 20;
      for (int64_t i = 0; i < n; i += 5) x[i] = -kInfinity;
      const float greatest = n ? *std::max_element(x.begin(), x.end()) : -kInfinity;
      CHECK(kernels->maximum(x.data(), n) == greatest);
      const float shift = n > 1 ? greatest : 0;
      std::vector<float> to(n + 1, 7);
      kernels->exponentials(x.data(), shift, n, to.data());
      for (int64_t i = 0; i < n; ++i) {
        const double expected = std::exp(static_cast<double>(x[i] - shift));
        CHECK(std::abs(to[i] - expected) <= 4 * 0x1p-23 * expected + 1e-37);
        if (x[i] == -kInfinity) CHECK(to[i] == 0);
      }
      CHECK(to[n] == 7);
      for (int64_t i = 0; i < n; ++i) {
        const float before = x[i];
        x[i] = NAN;
        CHECK(std::isnan(kernels->maximum(x.data(), n)));
        x[i] = before;
      }
    }
  }
}

}  // namespace
}  // namespace firstlm
