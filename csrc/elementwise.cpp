#include "elementwise.h"

#include <cmath>
#include <utility>

namespace firstlm {

void rms_norm(const Kernels& kernels, const float* x, const float* weight, int64_t n, double eps,
              float* to) {
  const float mean = kernels.dot_f32(x, x, n) / static_cast<float>(n);
  const float scale = 1 / std::sqrt(mean + static_cast<float>(eps));
  kernels.scaled_product(x, weight, scale, n, to);
}

Rope::Rope(std::vector<float> inverse_frequencies, double scaling)
    : inverse_frequencies_(std::move(inverse_frequencies)), scaling_(static_cast<float>(scaling)) {}

void Rope::angles(int64_t position, float* cos, float* sin) const {
  for (size_t i = 0; i < inverse_frequencies_.size(); ++i) {
    // Rounded to f32 as in transformers: at position 10,000 that moves an angle by up to 5e-4, and
    // models were trained with it.
    const float angle = static_cast<float>(position) * inverse_frequencies_[i];
    cos[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * scaling_;
    sin[i] = static_cast<float>(std::sin(static_cast<double>(angle))) * scaling_;
  }
}

void rotate(const Kernels& kernels, const float* cos, const float* sin, int64_t half, float* head) {
  kernels.rotate_pairs(cos, sin, half, head, head + half);
}

void silu_and_multiply(const Kernels& kernels, const float* gate_up, int64_t I, float* to) {
  kernels.silu_and_multiply(gate_up, I / kGateBlock, to);
}

}  // namespace firstlm
