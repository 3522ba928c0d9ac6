// Router scoring: hidden states of the prompt -> pooled features -> one logit per sequence.
// Letters: B sequences, T tokens, D hidden size, W windows, F = W * D features, H bottleneck units.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "dtype.h"
#include "pooling.h"

namespace firstlm {

struct HiddenStates {
  const void* data;  // [B, T, D], elements of a token contiguous
  DType dtype;
  int64_t B, T, D;
  int64_t stride_B, stride_T;  // elements

  int64_t bytes() const;
};

// Elements, of pooled's type, of the scratch that router_pool needs; none for one thread.
int64_t scratch_elements(const HiddenStates& hidden, Pooling pooling, int threads);

// prompt_mask [B, T] contiguous, true for the prompt's tokens. Writes pooled [B, W * D], f64 if
// hidden is f64 and f32 otherwise; a row without a prompt token becomes zeros. Hidden states of
// masked tokens are not read, and do not change the result's bits; nor do the other rows and the
// number of threads.
void router_pool(const Kernels& kernels, const HiddenStates& hidden, const bool* prompt_mask,
                 Pooling pooling, int threads, void* scratch, void* pooled);

// Adjoint of router_pool: grad_pooled [B, W * D] -> grad_hidden [B, T, D] contiguous, every element
// written. `hidden` gives shape and type; its data is not read.
void router_pool_backward(const HiddenStates& hidden, const bool* prompt_mask, Pooling pooling,
                          const void* grad_pooled, int threads, void* grad_hidden);

// Sequences one after the other, without padding.
struct PackedStates {
  const void* data;  // [N, D], elements of a token contiguous
  DType dtype;
  int64_t N, D, B;
  int64_t stride_N;  // elements
  const int64_t*
      offsets;  // [B + 1], rising from 0 to N: sequence b is tokens [offsets[b], offsets[b + 1])

  int64_t length(int64_t b) const { return offsets[b + 1] - offsets[b]; }
  int64_t bytes() const;
};

int64_t scratch_elements(const PackedStates& hidden, Pooling pooling, int threads);

// router_pool of sequences whose tokens all are the prompt's, to the same bits.
void router_pool_packed(const Kernels& kernels, const PackedStates& hidden, Pooling pooling,
                        int threads, void* scratch, void* pooled);

// Its adjoint, as router_pool_backward: grad_hidden [N, D] contiguous.
void router_pool_packed_backward(const PackedStates& hidden, Pooling pooling,
                                 const void* grad_pooled, int threads, void* grad_hidden);

template <class T>
struct RouterHead {
  int64_t F, H;
  const T* weight;      // [H, F]
  const T* bias;        // [H]
  const T* out_weight;  // [H]; null for the linear head, whose H is 1
  const T* out_bias;    // [1]
  double norm_eps;      // features are divided by their root mean square if positive
};

// pooled [B, F] -> logit [B]. units [B, H] is scratch, used by the bottleneck head only.
template <class T>
void router_head(const Kernels& kernels, const RouterHead<T>& head, const T* pooled, int64_t B,
                 int threads, T* units, T* logit);

}  // namespace firstlm
