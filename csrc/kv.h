// Appending to the key/value cache: new tokens are copied to their slots.
// Letters: R rows, H key/value heads, C capacity in slots, T new tokens, D head_dim.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace firstlm {

// The keys or the values of one append. Element types do not matter, their size does.
struct NewTokens {
  void* storage;       // [R, H, C, D] contiguous
  const void* tokens;  // [R, H, T, D], elements of a token contiguous; apart from the storage
  int64_t R, H, C, T, D;
  int64_t stride_R, stride_H, stride_T;  // of tokens, in elements
  int64_t element_size;                  // bytes

  int64_t bytes() const { return R * H * T * D * element_size; }
};

// The first row whose tokens do not fit: start outside [0, C - T]. R if there is none.
int64_t find_misfit(const int64_t* start, int64_t R, int64_t C, int64_t T);

// Copies token t of row r to slot start[r] + t, keys and values alike (their D may differ). Every
// row must fit.
void kv_append(const Kernels& kernels, const NewTokens& keys, const NewTokens& values,
               const int64_t* start, int threads);

}  // namespace firstlm
