#include "kv.h"

#include <algorithm>

#include "parallel.h"

namespace firstlm {
namespace {

// Tokens of one work item. Projections leave a token's heads side by side, so a block of tokens is
// read whole while it is in cache, although each head's part of it goes elsewhere.
constexpr int64_t kTokensPerBlock = 128;

void append_block(const Kernels& kernels, const NewTokens& to, int64_t r, int64_t start,
                  int64_t block) {
  const int64_t first = block * kTokensPerBlock;
  const int64_t count = std::min(kTokensPerBlock, to.T - first);
  const int64_t token_bytes = to.D * to.element_size;
  for (int64_t h = 0; h < to.H; ++h) {
    const char* from = static_cast<const char*>(to.tokens) +
                       (r * to.stride_R + h * to.stride_H + first * to.stride_T) * to.element_size;
    char* slot =
        static_cast<char*>(to.storage) + ((r * to.H + h) * to.C + start + first) * token_bytes;
    kernels.copy_rows(from, to.stride_T * to.element_size, slot, count, token_bytes);
  }
}

}  // namespace

int64_t find_misfit(const int64_t* start, int64_t R, int64_t C, int64_t T) {
  return std::find_if(start, start + R, [&](int64_t s) { return s < 0 || s > C - T; }) - start;
}

void kv_append(const Kernels& kernels, const NewTokens& keys, const NewTokens& values,
               const int64_t* start, int threads) {
  const int64_t blocks = (keys.T + kTokensPerBlock - 1) / kTokensPerBlock;
  const int team = threads_for(keys.bytes() + values.bytes(), threads);
  parallel_for(2 * keys.R * blocks, team, [&](int64_t item) {
    const int64_t r = item / 2 / blocks;
    append_block(kernels, item % 2 ? values : keys, r, start[r], item / 2 % blocks);
  });
}

}  // namespace firstlm
