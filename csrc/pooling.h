// Which prompt tokens feed which pooled feature: the one definition, for CPU and CUDA.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace firstlm {

enum class PoolKind { kMean, kWindowedMean, kLast };

struct Pooling {
  PoolKind kind;
  int64_t windows;  // at least 1; read by kWindowedMean only

  FIRSTLM_HOST_DEVICE int64_t W() const { return kind == PoolKind::kWindowedMean ? windows : 1; }
};

// Prompt tokens counted from the row's first one, whatever lies between them.
struct TokenRange {
  int64_t begin;
  int64_t end;

  FIRSTLM_HOST_DEVICE int64_t size() const { return end - begin; }
};

// The tokens that feature window w of a row with n > 0 prompt tokens is the mean of; never empty.
// Ranges follow one another; with n < W, windows share a token instead of being empty.
FIRSTLM_HOST_DEVICE inline TokenRange pooled_range(Pooling pooling, int64_t w, int64_t n) {
  if (pooling.kind == PoolKind::kLast) return {n - 1, n};
  const int64_t begin = w * n / pooling.W();
  return {begin, larger(begin + 1, (w + 1) * n / pooling.W())};
}

struct WindowRange {
  int64_t begin;
  int64_t end;
};

// The inverse: the windows whose mean has the prompt token of that rank in it, among n.
FIRSTLM_HOST_DEVICE inline WindowRange windows_of(Pooling pooling, int64_t rank, int64_t n) {
  if (pooling.kind == PoolKind::kLast) return {0, rank == n - 1 ? 1 : 0};
  const int64_t W = pooling.W();
  const int64_t end = ceil_div((rank + 1) * W, n);  // the first window that begins after it
  return {n < W ? ceil_div(rank * W, n) : end - 1, end};
}

}  // namespace firstlm
