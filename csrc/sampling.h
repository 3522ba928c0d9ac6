// From the logits of one sequence to its next token.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "cpu/kernels.h"

namespace firstlm {

// In the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
struct SamplingSettings {
  double temperature = 0;         // 0: greedy, and all but the repetition penalty is ignored
  int64_t top_k = 0;              // 0: all
  double top_p = 1;               // 1: all
  double min_p = 0;               // 0: all
  double repetition_penalty = 1;  // 1: none
  uint64_t seed = 0;

  bool greedy() const { return temperature == 0; }
  void check() const;  // std::invalid_argument naming the setting and what is accepted
};

// The arithmetic is that of transformers' logits processors in float32: the same tokens remain. Of
// equal logits at the edge of top-p the greatest indices do, as after a stable sort (torch's own
// choice there depends on the processor).
class Sampler {
 public:
  // `vocab_size` logits a call; scratch is allocated here and never again. Checks the settings.
  Sampler(const SamplingSettings& settings, int64_t vocab_size,
          const Kernels& kernels = firstlm::kernels());

  // A token of the prompt or the answer, for the repetition penalty. Tokens beyond vocab_size are
  // ignored; std::invalid_argument for a negative one.
  void note(int64_t token);

  // The next token; ties of a greedy choice go to the lowest index. `logits` [vocab_size] are
  // overwritten. Does not note the token. The same seed gives the same draws on every platform.
  // std::runtime_error if a logit is NaN, or if the greatest one is infinite and not the choice.
  int64_t sample(float* logits);

  // The probabilities that `sample` would draw from, [vocab_size]; as in `sample`.
  void probabilities(float* logits, float* to);

 private:
  // What remains, in the order of logits, the greater index first among equal ones: all down to
  // the one of this logit and token. Weights are exp(logit - greatest).
  struct Kept {
    float greatest;
    float logit;
    int64_t token;
    float weight;  // and none of less weight
    double total;  // of the weights, as sums_ has it by chunk
  };
  struct Candidate {
    float logit, weight;
    int32_t token;
  };

  int64_t num_chunks() const { return maxima_.size(); }
  int64_t chunk_size(int64_t chunk) const;

  void penalize(float* logits) const;
  int64_t find_greatest(const float* logits);
  Kept keep_likely(float* logits);
  float kth_greatest(const float* logits);
  void keep_mass(const float* logits, Kept* kept);
  void sum_weights(const float* logits, Kept* kept);
  bool weigh(const float* logits, const Kept& kept, int64_t chunk, float* weights) const;
  int64_t draw(const float* logits, const Kept& kept);

  SamplingSettings settings_;
  int64_t vocab_size_;
  const Kernels* kernels_;
  std::mt19937_64 generator_;

  std::vector<uint8_t> seen_;   // [vocab_size], for a repetition penalty
  std::vector<int32_t> noted_;  // those that were seen
  std::vector<float> maxima_;   // of the logits, by chunk
  std::vector<double> sums_;    // of the weights, by chunk
  std::vector<float> ordered_;  // maxima_ in another order
  std::vector<Candidate> candidates_;
};

}  // namespace firstlm
