// Attention of one query token per row over its part of the key/value cache.
// Letters: R rows, Hq query heads, H key/value heads, G = Hq / H, C capacity in slots, D head_dim.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "dtype.h"

namespace firstlm {

// Keys or values in the cache.
struct CacheView {
  const void* data;                      // [R, H, C, D], elements of a slot contiguous
  int64_t stride_R, stride_H, stride_C;  // elements
};

struct DecodeAttention {
  DType dtype;  // of query, keys, values and output
  int64_t R, Hq, H, C, D;
  const void* query;           // [R, Hq, D], elements of a head contiguous
  int64_t stride_R, stride_H;  // of query, in elements
  CacheView keys, values;
  const int64_t *begin, *end;  // [R]: a row sees slots [begin, end)
  double scale;                // of the scores
  double soft_cap;             // then cap * tanh(score / cap), if positive

  int64_t G() const { return Hq / H; }
  int64_t cache_bytes() const;  // of the keys and values that are read
  int64_t max_splits() const;
};

// The first row whose slots are not 0 <= begin <= end <= C. R if there is none.
int64_t find_misfit(const int64_t* begin, const int64_t* end, int64_t R, int64_t C);

// Elements, of the accumulator's type, of the scratch that decode_attention needs.
int64_t scratch_elements(const DecodeAttention& attention);

// output [R, Hq, D] contiguous: softmax(scores) x values, zeros in a row that sees nothing. A row's
// result depends on neither the other rows, nor the place of its slots, nor the number of threads.
void decode_attention(const Kernels& kernels, const DecodeAttention& attention, int threads,
                      void* scratch, void* output);

}  // namespace firstlm
