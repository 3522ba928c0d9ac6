#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "arithmetic.h"
#include "parallel.h"

namespace firstlm {
namespace {

// Written as wide loads, which compilers make of whatever the instruction set has. Bytes so far
// ahead are prefetched: what hardware prefetches by itself leaves a third of the bandwidth of Zen 5
// unused. Past the end that does no harm.
uint64_t read_block(const char* data, int64_t bytes) {
  using Part = uint64_t __attribute__((vector_size(16)));  // larger ones spill where SSE is all
  constexpr int64_t kParts = 8, kStep = kParts * sizeof(Part), kAhead = 6 * 1024;
  Part sums[kParts] = {};
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    prefetch(data + i + kAhead);
    prefetch(data + i + kAhead + 64);
    for (int64_t p = 0; p < kParts; ++p) {
      Part part;
      std::memcpy(&part, data + i + p * sizeof(Part), sizeof(Part));
      sums[p] ^= part;
    }
  }
  uint64_t result = 0;
  for (const Part& sum : sums) result ^= sum[0] ^ sum[1];
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
  const int64_t blocks = ceil_div(bytes, kBlock);
  std::atomic<uint64_t> result = 0;
  parallel_for(blocks, threads_for(bytes, threads), [&](int64_t block) {
    const int64_t begin = block * kBlock;
    result ^= read_block(static_cast<const char*>(data) + begin, std::min(kBlock, bytes - begin));
  });
  return result;
}

}  // namespace firstlm
