// What stands between a decoder layer's products: norm, rotation, activation. All f32, one thread.
// Letters: M tokens, D hidden size, H heads, I intermediate size.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace firstlm {

// to [n] = x / sqrt(mean(x^2) + eps) * weight (RMSNorm). `to` may be x.
void rms_norm(const Kernels& kernels, const float* x, const float* weight, int64_t n, double eps,
              float* to);

// Rotary position embedding (arXiv 2104.09864) in the half-split form of transformers.
class Rope {
 public:
  // inverse_frequencies [rotated / 2]; `scaling` multiplies cos and sin (yarn and others).
  Rope(std::vector<float> inverse_frequencies, double scaling);

  int64_t rotated_dim() const { return 2 * static_cast<int64_t>(inverse_frequencies_.size()); }

  // cos and sin of one position, each [rotated / 2].
  void angles(int64_t position, float* cos, float* sin) const;

 private:
  std::vector<float> inverse_frequencies_;
  float scaling_;
};

// Rotates the first 2 * half elements of a head in place: (a, b) -> (a cos - b sin, b cos + a sin),
// a the first half of them, b the second.
void rotate(const Kernels& kernels, const float* cos, const float* sin, int64_t half, float* head);

// The output of the fused gate and up projections: blocks of kGateBlock gates and then their ups.
// gate_up [2 * I], I a multiple of kGateBlock -> to [I] = silu(gate) * up. `to` must not overlap.
void silu_and_multiply(const Kernels& kernels, const float* gate_up, int64_t I, float* to);

}  // namespace firstlm
