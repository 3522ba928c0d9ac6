// From the logits of one sequence to its next token.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace firstlm {

// In the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
struct SamplingSettings {
  double temperature = 0;         // 0: greedy, and all but the repetition penalty is ignored
  int64_t top_k = 0;              // 0: all
  double top_p = 1;               // 1: all
  double min_p = 0;               // 0: all
  double repetition_penalty = 1;  // 1: none
  uint64_t seed = 0;

  void check() const;  // std::invalid_argument naming the setting and what is accepted
};

class Sampler {
 public:
  // `vocab_size` logits a call; scratch is allocated here and never again.
  Sampler(const SamplingSettings& settings, int64_t vocab_size);

  // A token of the prompt or the answer, for the repetition penalty.
  void note(int64_t token);

  // The next token; ties of a greedy choice go to the lowest index. `logits` [vocab_size] may be
  // overwritten. Does not note the token.
  int64_t sample(float* logits);

  // The probabilities that `sample` would draw from, [vocab_size]; as in `sample`.
  void probabilities(float* logits, float* to);

 private:
  void penalize(float* logits) const;
  int64_t keep_likely(float* logits);

  SamplingSettings settings_;
  int64_t vocab_size_;
  std::vector<uint8_t> seen_;
  std::vector<int32_t> order_;
  std::vector<float> weights_;
  std::mt19937_64 generator_;
};

}  // namespace firstlm
