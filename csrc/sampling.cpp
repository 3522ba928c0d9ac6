#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "arithmetic.h"

namespace firstlm {
namespace {

constexpr int64_t kChunk = 256;  // logits that are taken, or left alone, together
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void require(bool accepted, const char* name, double value, const char* range) {
  if (accepted) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                              "; accepted is " + range);
}

// The slow look at a chunk whose maximum came out as NaN.
float maximum_or_throw(const float* logits, int64_t first, int64_t n) {
  float greatest = -kInfinity;
  for (int64_t i = first; i < first + n; ++i) {
    if (std::isnan(logits[i])) {
      throw std::runtime_error("the logit of token " + std::to_string(i) + " is NaN");
    }
    greatest = std::max(greatest, logits[i]);
  }
  return greatest;
}

// weights [kChunk]
double sum_of_chunk(const float* weights) {
  constexpr int kLanes = 8;
  float sums[kLanes] = {};
  for (int64_t i = 0; i < kChunk; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += weights[i + lane];
  }
  double total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

}  // namespace

void SamplingSettings::check() const {
  require(greedy() || (static_cast<float>(temperature) > 0 && std::isfinite(temperature)),
          "temperature", temperature, "0 (greedy) or a positive float32");
  require(top_k >= 0, "top_k", static_cast<double>(top_k), "0 (all) or more");
  require(top_p >= 0 && top_p <= 1, "top_p", top_p, "0 to 1 (all)");
  require(min_p >= 0 && min_p <= 1, "min_p", min_p, "0 (all) to 1");
  require(static_cast<float>(repetition_penalty) > 0 && std::isfinite(repetition_penalty),
          "repetition_penalty", repetition_penalty, "a positive float32, 1 for none");
}

Sampler::Sampler(const SamplingSettings& settings, int64_t vocab_size, const Kernels& kernels)
    : settings_(settings), vocab_size_(vocab_size), kernels_(&kernels), generator_(settings.seed) {
  settings.check();
  if (vocab_size < 1 || vocab_size > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("vocab_size is " + std::to_string(vocab_size) +
                                "; accepted is 1 to 2^31 - 1");
  }
  if (settings.repetition_penalty != 1) {
    seen_.resize(vocab_size);
    noted_.reserve(vocab_size);
  }
  maxima_.resize(ceil_div(vocab_size, kChunk));
  if (settings.greedy()) return;
  sums_.resize(maxima_.size());
  ordered_.resize(maxima_.size());
  if (settings.top_k > 0 || settings.top_p < 1) candidates_.reserve(vocab_size);
}

void Sampler::note(int64_t token) {
  if (token < 0) {
    throw std::invalid_argument("token " + std::to_string(token) + " is negative");
  }
  if (seen_.empty() || token >= vocab_size_ || seen_[token]) return;
  seen_[token] = 1;
  noted_.push_back(static_cast<int32_t>(token));
}

int64_t Sampler::sample(float* logits) {
  if (!settings_.greedy()) return draw(logits, keep_likely(logits));
  penalize(logits);
  return find_greatest(logits);
}

void Sampler::probabilities(float* logits, float* to) {
  if (settings_.greedy()) {
    penalize(logits);
    const int64_t token = find_greatest(logits);
    std::fill_n(to, vocab_size_, 0.0f);
    to[token] = 1;
    return;
  }
  const Kept kept = keep_likely(logits);
  float weights[kChunk];
  for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
    const bool any = weigh(logits, kept, chunk, weights);
    for (int64_t i = 0; i < chunk_size(chunk); ++i) {
      to[chunk * kChunk + i] = any ? static_cast<float>(weights[i] / kept.total) : 0;
    }
  }
}

int64_t Sampler::chunk_size(int64_t chunk) const {
  return smaller(kChunk, vocab_size_ - chunk * kChunk);
}

void Sampler::penalize(float* logits) const {
  const auto penalty = static_cast<float>(settings_.repetition_penalty);
  for (const int32_t token : noted_) {
    float& logit = logits[token];
    logit = logit < 0 ? logit * penalty : logit / penalty;
  }
}

// The first of the greatest; sets maxima_.
int64_t Sampler::find_greatest(const float* logits) {
  int64_t best = 0;
  for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
    const int64_t first = chunk * kChunk, n = chunk_size(chunk);
    float greatest = kernels_->maximum(logits + first, n);
    if (std::isnan(greatest)) greatest = maximum_or_throw(logits, first, n);
    maxima_[chunk] = greatest;
    if (greatest > maxima_[best]) best = chunk;
  }
  const float* first = logits + best * kChunk;
  return std::find(first, first + chunk_size(best), maxima_[best]) - logits;
}

Sampler::Kept Sampler::keep_likely(float* logits) {
  penalize(logits);
  const auto temperature = static_cast<float>(settings_.temperature);
  if (temperature != 1) {
    for (int64_t i = 0; i < vocab_size_; ++i) logits[i] /= temperature;
  }
  const float greatest = logits[find_greatest(logits)];
  if (!std::isfinite(greatest)) {
    throw std::runtime_error("the greatest logit, divided by the temperature, is " +
                             std::to_string(greatest) + ": there is nothing to draw from");
  }
  Kept kept{greatest, -kInfinity, 0, 0, 0};
  if (settings_.top_k > 0 && settings_.top_k < vocab_size_) kept.logit = kth_greatest(logits);
  if (settings_.top_p < 1) keep_mass(logits, &kept);
  kept.weight = static_cast<float>(settings_.min_p);
  sum_weights(logits, &kept);
  return kept;
}

// The logit of rank top_k. All equal ones are kept.
float Sampler::kth_greatest(const float* logits) {
  const int64_t k = settings_.top_k;
  // At least k logits reach the k-th of the chunks' maxima.
  float bound = -kInfinity;
  if (k <= num_chunks()) {
    std::copy(maxima_.begin(), maxima_.end(), ordered_.begin());
    std::nth_element(ordered_.begin(), ordered_.begin() + (k - 1), ordered_.end(),
                     std::greater<>());
    bound = ordered_[k - 1];
  }
  candidates_.clear();
  for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
    if (maxima_[chunk] < bound) continue;
    const int64_t first = chunk * kChunk;
    for (int64_t i = first; i < first + chunk_size(chunk); ++i) {
      if (logits[i] >= bound) candidates_.push_back({logits[i], 0, static_cast<int32_t>(i)});
    }
  }
  const auto kth = candidates_.begin() + (k - 1);
  std::nth_element(candidates_.begin(), kth, candidates_.end(),
                   [](const Candidate& a, const Candidate& b) { return a.logit > b.logit; });
  return kth->logit;
}

// Top-p: a token goes if it and all behind it have no more than 1 - top_p of the weight; the first
// always stays.
void Sampler::keep_mass(const float* logits, Kept* kept) {
  sum_weights(logits, kept);
  const double total = kept->total;
  // Tokens of less have less than 1 - top_p together.
  const double least = 0.999 * (1 - settings_.top_p) * total / vocab_size_;
  const float bound = kept->greatest + static_cast<float>(std::log(least)) - 0.01f;
  candidates_.clear();
  float weights[kChunk];
  for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
    if (maxima_[chunk] < bound || !weigh(logits, *kept, chunk, weights)) continue;
    for (int64_t i = 0; i < chunk_size(chunk); ++i) {
      const int64_t token = chunk * kChunk + i;
      if (weights[i] < least || weights[i] == 0) continue;
      candidates_.push_back({logits[token], weights[i], static_cast<int32_t>(token)});
    }
  }

  const auto comes_before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token > b.token;
  };
  const auto threshold = static_cast<float>(1 - settings_.top_p);
  const auto stays_behind = [&](double weight_before) {
    return static_cast<float>((total - weight_before) / total) > threshold;
  };
  // The last that stays lies in [first, last), which halves; `before` is the weight of all before.
  auto first = candidates_.begin(), last = candidates_.end();
  double before = 0;
  while (last - first > 1) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, comes_before);
    double with_upper = before;
    for (auto candidate = first; candidate < middle; ++candidate) with_upper += candidate->weight;
    if (stays_behind(with_upper)) {
      first = middle;
      before = with_upper;
    } else {
      last = middle;
    }
  }
  kept->logit = first->logit;
  kept->token = first->token;
}

void Sampler::sum_weights(const float* logits, Kept* kept) {
  kept->total = 0;
  float weights[kChunk];
  for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
    sums_[chunk] = weigh(logits, *kept, chunk, weights) ? sum_of_chunk(weights) : 0;
    kept->total += sums_[chunk];
  }
}

// weights [kChunk] of a chunk's tokens, 0 for those that are not kept and beyond the last; false,
// and weights are left alone, if no token is kept.
bool Sampler::weigh(const float* logits, const Kept& kept, int64_t chunk, float* weights) const {
  if (maxima_[chunk] < kept.logit) return false;
  const int64_t first = chunk * kChunk, n = chunk_size(chunk);
  const float* x = logits + first;
  kernels_->exponentials(x, kept.greatest, n, weights);
  std::fill(weights + n, weights + kChunk, 0.0f);
  if (kept.logit > -kInfinity) {
    const int64_t first_equal = std::clamp<int64_t>(kept.token - first, 0, n);
    for (int64_t i = 0; i < first_equal; ++i) weights[i] = x[i] > kept.logit ? weights[i] : 0;
    for (int64_t i = first_equal; i < n; ++i) weights[i] = x[i] >= kept.logit ? weights[i] : 0;
  }
  if (kept.weight > 0) {
    for (int64_t i = 0; i < n; ++i) weights[i] = weights[i] >= kept.weight ? weights[i] : 0;
  }
  return true;
}

int64_t Sampler::draw(const float* logits, const Kept& kept) {
  // 53 bits: the standard's distributions differ between libraries.
  const double target = static_cast<double>(generator_() >> 11) * 0x1p-53 * kept.total;
  // Where the sum passes the target; the last that has weight, should rounding keep it below.
  int64_t chosen = 0;
  double before = 0, sum = 0;
  for (int64_t chunk = 0; chunk < num_chunks() && sum <= target; ++chunk) {
    if (sums_[chunk] == 0) continue;
    chosen = chunk;
    before = sum;
    sum += sums_[chunk];
  }
  float weights[kChunk];
  weigh(logits, kept, chosen, weights);
  int64_t token = 0;
  for (int64_t i = 0; i < kChunk && before <= target; ++i) {
    if (weights[i] == 0) continue;
    token = chosen * kChunk + i;
    before += weights[i];
  }
  return token;
}

}  // namespace firstlm
