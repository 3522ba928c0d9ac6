#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.h"

namespace firstlm {
namespace {

// Written so that compilers make it wide loads on every instruction set. Bytes so far ahead are
// prefetched: what hardware prefetches by itself leaves a fifth of the bandwidth unused on Zen 5.
// Past the end that does no harm.
uint64_t read_block(const char* data, int64_t bytes) {
  constexpr int64_t kLanes = 16, kStep = kLanes * 8, kAhead = 6 * 1024;
  uint64_t lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    uint64_t words[kLanes];
    for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(data + i + kAhead + line);
    std::memcpy(words, data + i, kStep);
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] ^= words[lane];
  }
  uint64_t result = 0;
  for (const uint64_t lane : lanes) result ^= lane;
  for (; i < bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + i, std::min<int64_t>(8, bytes - i));
    result ^= word;
  }
  return result;
}

}  // namespace

uint64_t read_all(const void* data, int64_t bytes, int threads) {
  constexpr int64_t kBlock = 256 * 1024;
  const int64_t blocks = (bytes + kBlock - 1) / kBlock;
  std::atomic<uint64_t> result = 0;
  parallel_for(blocks, threads_for(bytes, threads), [&](int64_t block) {
    const int64_t begin = block * kBlock;
    result ^= read_block(static_cast<const char*>(data) + begin, std::min(kBlock, bytes - begin));
  });
  return result;
}

}  // namespace firstlm
