#include "kv.h"

#include <algorithm>
#include <utility>

#include "arithmetic.h"
#include "parallel.h"

namespace firstlm {
namespace {

// Tokens of one work item at most: what is read of them stays in cache until the last head of
// theirs is copied.
constexpr int64_t kMaxTokens = 512;
// An append of more bytes is written past the caches: it would not stay in them, and lines that are
// written whole need not be read first.
constexpr int64_t kMaxCachedBytes = 256 * 1024;

// Sequences are split only as far as threads need: long pieces of memory are copied fastest.
int64_t tokens_per_item(int64_t R, int64_t T, int threads) {
  const int64_t items_per_sequence = ceil_div(2 * threads, std::max<int64_t>(2 * R, 1));
  return std::clamp<int64_t>(ceil_div(T, items_per_sequence), 1, kMaxTokens);
}

// Tokens [first, first + count) of row r.
void append_tokens(const Kernels& kernels, const NewTokens& to, int64_t r, int64_t start,
                   int64_t first, int64_t count, bool past_caches) {
  const int64_t bytes = to.D * to.element_size;
  const char* from = static_cast<const char*>(to.tokens) +
                     (r * to.stride_R + first * to.stride_T) * to.element_size;
  char* slot = static_cast<char*>(to.storage) + (r * to.H * to.C + start + first) * bytes;
  RowCopy copy{.from = from,
               .from_outer = to.stride_H * to.element_size,
               .from_inner = to.stride_T * to.element_size,
               .to = slot,
               .to_outer = to.C * bytes,
               .to_inner = bytes,
               .outer = to.H,
               .inner = count,
               .bytes = bytes,
               .past_caches = past_caches};
  // Projections leave a token's heads side by side. Read in that order, they are one stream from
  // memory; head by head, all but the first come from a cache that writes leave to them.
  if (past_caches && to.stride_H < to.stride_T) {
    std::swap(copy.from_outer, copy.from_inner);
    std::swap(copy.to_outer, copy.to_inner);
    std::swap(copy.outer, copy.inner);
  }
  kernels.copy_rows(copy);
}

}  // namespace

int64_t find_misfit(const int64_t* start, int64_t R, int64_t C, int64_t T) {
  return std::find_if(start, start + R, [&](int64_t s) { return s < 0 || s > C - T; }) - start;
}

void kv_append(const Kernels& kernels, const NewTokens& keys, const NewTokens& values,
               const int64_t* start, int threads) {
  const int64_t R = keys.R, T = keys.T, bytes = keys.bytes() + values.bytes();
  const int team = threads_for(bytes, threads);
  const int64_t tokens = tokens_per_item(R, T, team), items = ceil_div(T, tokens);
  parallel_for(2 * R * items, team, [&](int64_t item) {
    const int64_t r = item / 2 / items, first = item / 2 % items * tokens;
    append_tokens(kernels, item % 2 ? values : keys, r, start[r], first,
                  std::min(tokens, T - first), bytes > kMaxCachedBytes);
  });
}

}  // namespace firstlm
