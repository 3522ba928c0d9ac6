// Attention of many consecutive tokens of one sequence over its key/value cache, themselves
// included. Letters: T new tokens, Hq query heads, H key/value heads, G = Hq / H, C slots, D
// head_dim.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "cpu/kernels.h"
#include "team.h"

namespace firstlm {

struct PrefillAttention {
  DType dtype;  // of the cache: f32, bf16 or f16
  int64_t T, Hq, H, D;
  const float* query;         // [T, Hq, D], rotated
  int64_t stride_T;           // of query and output, in elements; heads are D apart
  const void *keys, *values;  // [H, C, D]
  int64_t stride_H;           // of keys and values, in elements; slots are D apart
  int64_t first_slot;         // of the first new token; token t is in slot first_slot + t
  int64_t begin;              // slots before it hold nothing that is seen; <= first_slot
  int64_t window;             // a token sees at most so many slots, itself included; 0 = all
  double scale;
};

// Bytes of scratch of one thread: no more for longer sequences, and best 64-byte aligned.
int64_t prefill_attention_scratch(const PrefillAttention& attention);

// output [T, Hq, D] f32, as query: softmax(scale * query keys^T) values over the slots that token t
// sees: (first_slot + t - window, first_slot + t], none before `begin`. Called by every thread of a
// team, each with its own scratch; shares the work by what tokens cost, without a barrier. A
// token's bits depend neither on the team's size nor on which tokens come in one call.
void prefill_attention(const Kernels& kernels, const PrefillAttention& attention, Share share,
                       std::byte* scratch, float* output);

}  // namespace firstlm
