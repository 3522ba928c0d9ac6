// Which elements of a row of flags are set: the indices of those that are, in order, without a copy
// of the flags to the host.
#pragma once

#include "span.cuh"
#include "warp.cuh"

namespace firstlm::cuda {

inline constexpr int kCompactThreads = 256;

// Flags [rows, n] at any distances.
struct Flags {
  Input<bool> data;
  int64_t n;
  int64_t stride_row, stride_n;

  __device__ bool load(int64_t row, int64_t i) const {
    return data.load(row * stride_row + i * stride_n);
  }
};

// How many of the flags of threads before this one are set, and how many of the block's.
struct FlagRank {
  int before, total;
};

__device__ inline FlagRank rank_in_block(bool flag, Shared<int, kWarpSize>& counts) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const unsigned ballot = __ballot_sync(kAllLanes, flag);
  if (lane == 0) counts.set(warp, __popc(ballot));
  __syncthreads();
  FlagRank rank{__popc(ballot & ((1u << lane) - 1)), 0};
  for (int w = 0; w < kCompactThreads / kWarpSize; ++w) {
    const int count = counts.get(w);
    if (w < warp) rank.before += count;
    rank.total += count;
  }
  __syncthreads();
  return rank;
}

// One block a row: indices [rows, n] gets those of the set flags, ascending, then those of the
// others if kWithOthers, else -1; counts [rows] gets how many are set.
template <class Index, class Count, bool kWithOthers>
__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(Flags flags, Output<Index> indices, Output<Count> counts) {
  __shared__ Shared<int, kWarpSize> partial;
  const int64_t row = blockIdx.x, n = flags.n;
  int mine = 0;
  for (int64_t i = threadIdx.x; i < n; i += kCompactThreads) mine += flags.load(row, i);
  const int64_t total = block_reduce<Sum>(mine, 0, partial);
  if (threadIdx.x == 0) counts.store(row, static_cast<Count>(total));

  int64_t set_before = 0;
  for (int64_t begin = 0; begin < n; begin += kCompactThreads) {
    const int64_t i = begin + threadIdx.x;
    const bool is_set = i < n && flags.load(row, i);
    const FlagRank rank = rank_in_block(is_set, partial);
    const int64_t before = set_before + rank.before;
    if (i < n) {
      const int64_t place = is_set ? before : total + i - before;
      indices.store(row * n + place, static_cast<Index>(is_set || kWithOthers ? i : -1));
    }
    set_before += rank.total;
  }
}

template <class Index, class Count, bool kWithOthers>
void compact(const Flags& flags, int64_t rows, void* indices, void* counts, void* stream) {
  launch(compact_kernel<Index, Count, kWithOthers>, rows, kCompactThreads, stream, flags,
         Output<Index>(indices, rows * flags.n), Output<Count>(counts, rows));
}

}  // namespace firstlm::cuda
