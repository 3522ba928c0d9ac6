// Decode attention over the cache. Letters as in ../attention.h.
//
// A row's slots are cut in splits of a fixed size, counted from its first one, so that a long
// sequence fills the device and a result does not depend on other rows. One kernel attends to a
// split, with the query heads of a key/value head sharing each read; another combines the splits by
// rescaling them to their common maximum (online softmax).
#include <cmath>
#include <limits>
#include <type_traits>

#include "../attention.h"
#include "copy.cuh"
#include "element.cuh"
#include "launchers.h"
#include "scratch.h"
#include "span.cuh"
#include "warp.cuh"

namespace firstlm::cuda {
namespace {

constexpr int kSlotsPerSplit = 128;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLoadsAtOnce = 4;  // of a thread, to have enough of them under way

template <class A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

template <class T>
struct Cache {
  Input<T> data;
  int64_t stride_R, stride_H, stride_C;

  __device__ int64_t at(int64_t r, int64_t h, int64_t slot) const {
    return r * stride_R + h * stride_H + slot * stride_C;
  }
};

struct SlotRange {
  int64_t begin, end;

  __device__ int64_t splits() const { return ceil_div(end - begin, kSlotsPerSplit); }
};

// What each row sees, cut to slots that exist.
struct Seen {
  Input<int64_t> begin, end;  // [R]
  int64_t C;

  __device__ SlotRange of(int64_t r) const {
    const int64_t first = smaller(larger(begin.load(r), 0), C);
    return {first, larger(smaller(end.load(r), C), first)};
  }
};

template <class T>
struct Heads {
  int64_t Hq, H, D;
  Input<T> query;
  int64_t stride_R, stride_H;  // of query
  Cache<T> keys, values;
  Seen seen;
  Accumulator<T> scale, soft_cap;

  __device__ int64_t G() const { return Hq / H; }
};

// What attention to each split gives: weights relative to the split's largest score.
template <class Span>
struct SplitResults {
  int64_t S;            // splits that a row can have
  Span maxima, totals;  // [R, Hq, S]: the largest score, and the sum of weights
  Span sums;            // [R, Hq, S, D]: of weighted values

  __device__ int64_t at(int64_t r, int64_t Hq, int64_t head, int64_t split) const {
    return (r * Hq + head) * S + split;
  }
};

// The lanes of a warp, in groups that share a slot.
struct LaneGroups {
  int lanes;  // of a group: a power of two

  __device__ int lane() const { return threadIdx.x % lanes; }
  // Slots that the block takes at once, and which of them is this thread's.
  __device__ int slots() const { return kThreads / lanes; }
  __device__ int slot() const { return threadIdx.x / lanes; }
};

// kLoadsAtOnce slots of one group, `column` on; zeros beyond `count` slots and D columns.
template <class T, int kPack>
__device__ void load_slots(const Cache<T>& cache, int64_t from, int first, int step, int count,
                           bool has_column, Pack<T, kPack>* packs) {
#pragma unroll
  for (int u = 0; u < kLoadsAtOnce; ++u) {
    const int i = first + u * step;
    packs[u] = has_column && i < count
                   ? cache.data.template load_pack<kPack>(from + i * cache.stride_C)
                   : Pack<T, kPack>{};
  }
}

// scores[g][i] = query head g · key of slot i, for `count` slots.
template <class T, int kPack, int kHeads, class Scores>
__device__ void score(const Heads<T>& heads, int64_t r, int64_t first_head, int heads_here,
                      int64_t keys_at, int count, LaneGroups groups, Scores& scores) {
  using A = Accumulator<T>;
  const int step = groups.slots();
  for (int64_t begin = 0; begin < heads.D; begin += groups.lanes * kPack) {
    const int64_t column = begin + groups.lane() * kPack;
    const bool has_column = column < heads.D;
    A query[kHeads][kPack] = {};
    for (int g = 0; g < kHeads; ++g) {
      if (g >= heads_here || !has_column) continue;
      const int64_t at = r * heads.stride_R + (first_head + g) * heads.stride_H + column;
      for (int e = 0; e < kPack; ++e) query[g][e] = to_accumulator(heads.query.load(at + e));
    }
    // Every lane stays in the loop: all take part in the reduction.
    for (int first = 0; first < count; first += step * kLoadsAtOnce) {
      Pack<T, kPack> keys[kLoadsAtOnce];
      load_slots(heads.keys, keys_at + column, first + groups.slot(), step, count, has_column,
                 keys);
#pragma unroll
      for (int u = 0; u < kLoadsAtOnce; ++u) {
        const int i = first + groups.slot() + u * step;
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
          A dot = 0;
          for (int e = 0; e < kPack; ++e) dot += query[g][e] * to_accumulator(keys[u].values[e]);
          dot = warp_reduce<Sum>(dot, 1, groups.lanes);
          if (groups.lane() != 0 || i >= count) continue;
          const int at = g * kSlotsPerSplit + i;
          scores.set(at, begin == 0 ? dot : scores.get(at) + dot);
        }
      }
    }
  }
}

template <class A>
struct Softmax {
  A maximum, total;
};

// One warp turns the scores of one head into weights relative to the largest of them.
template <class A, class Scores>
__device__ Softmax<A> softmax(int g, int count, A scale, A soft_cap, Scores& scores) {
  const int lane = threadIdx.x % kWarpSize, first = g * kSlotsPerSplit;
  A maximum = kMinusInfinity<A>, total = 0;
  for (int i = lane; i < count; i += kWarpSize) {
    A x = scale * scores.get(first + i);
    if (soft_cap > 0) x = soft_cap * std::tanh(x / soft_cap);
    scores.set(first + i, x);
    maximum = Max()(maximum, x);
  }
  maximum = warp_reduce<Max>(maximum);
  // Where all scores are minus infinity, this split weighs nothing beside the others.
  const A shift = maximum == kMinusInfinity<A> ? A(0) : maximum;
  for (int i = lane; i < count; i += kWarpSize) {
    const A weight = std::exp(scores.get(first + i) - shift);
    scores.set(first + i, weight);
    total += weight;
  }
  return {maximum, warp_reduce<Sum>(total)};
}

// sums[g][column] = Σ weights[g][i] value[i][column] over `count` slots, written to results.sums.
template <class T, int kPack, int kHeads, class Weights, class Partial>
__device__ void weigh(const Heads<T>& heads, int64_t r, int64_t first_head, int heads_here,
                      int64_t values_at, int count, LaneGroups groups, const Weights& weights,
                      Partial& partial, const SplitResults<InOut<Accumulator<T>>>& results) {
  using A = Accumulator<T>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int step = groups.slots();
  for (int64_t begin = 0; begin < heads.D; begin += groups.lanes * kPack) {
    const int64_t column = begin + groups.lane() * kPack;
    const bool has_column = column < heads.D;
    A sums[kHeads][kPack] = {};
    for (int first = groups.slot(); first < count; first += step * kLoadsAtOnce) {
      Pack<T, kPack> values[kLoadsAtOnce];
      load_slots(heads.values, values_at + column, first, step, count, has_column, values);
#pragma unroll
      for (int u = 0; u < kLoadsAtOnce; ++u) {
        const int i = first + u * step;
        if (i >= count) continue;
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
          if (g >= heads_here) continue;
          const A weight = weights.get(g * kSlotsPerSplit + i);
          for (int e = 0; e < kPack; ++e) {
            sums[g][e] += weight * to_accumulator(values[u].values[e]);
          }
        }
      }
    }
    // Over the groups of a warp, then over the warps.
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      for (int e = 0; e < kPack; ++e) {
        const A sum = warp_reduce<Sum>(sums[g][e], groups.lanes, kWarpSize);
        partial.set((warp * kPack + e) * kWarpSize + lane, sum);
      }
      __syncthreads();
      const bool writes = lane < groups.lanes && has_column && g < heads_here;
      for (int e = warp; writes && e < kPack; e += kWarps) {
        A sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += partial.get((w * kPack + e) * kWarpSize + lane);
        const int64_t at = results.at(r, heads.Hq, first_head + g, blockIdx.y);
        results.sums.store(at * heads.D + column + e, sum);
      }
      __syncthreads();
    }
  }
}

// One block a split (blockIdx.y) of a row, for up to kHeads query heads of one key/value head.
template <class T, int kPack, int kHeads>
__global__ void __launch_bounds__(kThreads)
    attend_kernel(Heads<T> heads, LaneGroups groups, SplitResults<InOut<Accumulator<T>>> results) {
  using A = Accumulator<T>;
  __shared__ Shared<A, kHeads * kSlotsPerSplit> scores;
  __shared__ Shared<A, kWarps * kWarpSize * kPack> partial;
  const int64_t G = heads.G(), blocks_per_group = ceil_div(G, kHeads);
  const int64_t of_row = blockIdx.x % (heads.H * blocks_per_group);
  const int64_t r = blockIdx.x / (heads.H * blocks_per_group), h = of_row / blocks_per_group;
  const int64_t first_in_group = of_row % blocks_per_group * kHeads;
  const int64_t first_head = h * G + first_in_group;
  const int heads_here = smaller(G - first_in_group, kHeads);

  const SlotRange seen = heads.seen.of(r);
  const int64_t split = blockIdx.y, first_slot = seen.begin + split * kSlotsPerSplit;
  if (first_slot >= seen.end) return;
  const int count = smaller(seen.end - first_slot, kSlotsPerSplit);

  score<T, kPack, kHeads>(heads, r, first_head, heads_here, heads.keys.at(r, h, first_slot), count,
                          groups, scores);
  __syncthreads();
  for (int g = threadIdx.x / kWarpSize; g < heads_here; g += kWarps) {
    const Softmax<A> of_head = softmax<A>(g, count, heads.scale, heads.soft_cap, scores);
    if (threadIdx.x % kWarpSize != 0) continue;
    const int64_t at = results.at(r, heads.Hq, first_head + g, split);
    results.maxima.store(at, of_head.maximum);
    results.totals.store(at, of_head.total);
  }
  __syncthreads();
  weigh<T, kPack, kHeads>(heads, r, first_head, heads_here, heads.values.at(r, h, first_slot),
                          count, groups, scores, partial, results);
}

// One block a query head and 32 columns of a row; a warp takes every kWarps-th split.
template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(SplitResults<Input<Accumulator<T>>> results, Seen seen, int64_t Hq, int64_t D,
                   Output<T> output) {
  using A = Accumulator<T>;
  __shared__ Shared<A, kThreads> sums, totals;
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t r = blockIdx.x / Hq, head = blockIdx.x % Hq;
  const int64_t column = int64_t{blockIdx.y} * kWarpSize + lane;
  const int64_t splits = seen.of(r).splits(), first = results.at(r, Hq, head, 0);

  A maximum = kMinusInfinity<A>;
  for (int64_t s = lane; s < splits; s += kWarpSize) {
    maximum = Max()(maximum, results.maxima.load(first + s));
  }
  maximum = warp_reduce<Max>(maximum);

  A sum = 0, total = 0;
  for (int64_t s = warp; s < splits; s += kWarps) {
    const A weight = std::exp(results.maxima.load(first + s) - maximum);
    total += weight * results.totals.load(first + s);
    if (column < D) sum += weight * results.sums.load((first + s) * D + column);
  }
  sums.set(warp * kWarpSize + lane, sum);
  totals.set(warp * kWarpSize + lane, total);
  __syncthreads();
  if (warp != 0 || column >= D) return;
  for (int w = 1; w < kWarps; ++w) {
    sum += sums.get(w * kWarpSize + lane);
    total += totals.get(w * kWarpSize + lane);
  }
  output.store((r * Hq + head) * D + column, from_accumulator<T>(splits == 0 ? A(0) : sum / total));
}

// --- Launchers
// ------------------------------------------------------------------------------------

int64_t splits_of(const DecodeAttention& attention) {
  return ceil_div(attention.C, kSlotsPerSplit);
}

template <class Span, class A>
SplitResults<Span> split_results(const DecodeAttention& attention, Scratch scratch) {
  const int64_t S = splits_of(attention), count = attention.R * attention.Hq * S;
  A* maxima = scratch.take<A>(count);
  A* totals = scratch.take<A>(count);
  A* sums = scratch.take<A>(count * attention.D);
  return {S, {maxima, count}, {totals, count}, {sums, count * attention.D}};
}

template <class T>
Cache<T> cache_of(const CacheView& view, const DecodeAttention& attention) {
  const int64_t R = attention.R, H = attention.H, C = attention.C, D = attention.D;
  const bool is_empty = R == 0 || C == 0 || D == 0;
  const int64_t extent =
      (R - 1) * view.stride_R + (H - 1) * view.stride_H + (C - 1) * view.stride_C + D;
  return {{view.data, is_empty ? 0 : extent}, view.stride_R, view.stride_H, view.stride_C};
}

template <class T>
Heads<T> heads_of(const DecodeAttention& attention) {
  const int64_t R = attention.R, Hq = attention.Hq, D = attention.D;
  const bool is_empty = R == 0 || Hq == 0 || D == 0;
  const int64_t extent = (R - 1) * attention.stride_R + (Hq - 1) * attention.stride_H + D;
  return {Hq,
          attention.H,
          D,
          {attention.query, is_empty ? 0 : extent},
          attention.stride_R,
          attention.stride_H,
          cache_of<T>(attention.keys, attention),
          cache_of<T>(attention.values, attention),
          {{attention.begin, R}, {attention.end, R}, attention.C},
          static_cast<Accumulator<T>>(attention.scale),
          static_cast<Accumulator<T>>(attention.soft_cap)};
}

void include(Alignment& alignment, const CacheView& view, int64_t element_size) {
  alignment.address(view.data)
      .distance(view.stride_R * element_size)
      .distance(view.stride_H * element_size)
      .distance(view.stride_C * element_size);
}

bool fits_packs(const DecodeAttention& attention) {
  const int64_t element_size = size_of(attention.dtype);
  Alignment alignment;
  alignment.distance(attention.D * element_size);
  include(alignment, attention.keys, element_size);
  include(alignment, attention.values, element_size);
  return alignment.fits_packs();
}

template <class T, int kPack, int kHeads>
void attend(const DecodeAttention& attention, const Scratch& scratch, void* stream) {
  using A = Accumulator<T>;
  LaneGroups groups{1};
  while (groups.lanes < kWarpSize && groups.lanes * kPack < attention.D) groups.lanes *= 2;
  const int64_t blocks = attention.R * attention.H * ceil_div(attention.G(), kHeads);
  launch(attend_kernel<T, kPack, kHeads>, grid(blocks, splits_of(attention)), kThreads, stream,
         heads_of<T>(attention), groups, split_results<InOut<A>, A>(attention, scratch));
}

// As many query heads share a read as there are; where packs do not fit, and for f64, none do.
template <class T>
auto attend_of(const DecodeAttention& attention) {
  constexpr int kPack = kMaxPack<T>;
  if (!fits_packs(attention)) return attend<T, 1, 1>;
  if constexpr (std::is_same_v<T, double>) {
    return attend<T, kPack, 1>;
  } else {
    const int64_t G = attention.G();
    if (G == 1) return attend<T, kPack, 1>;
    if (G == 2) return attend<T, kPack, 2>;
    if (G <= 4) return attend<T, kPack, 4>;
    return attend<T, kPack, 8>;
  }
}

}  // namespace

int64_t decode_attention_scratch(const DecodeAttention& attention) {
  const int64_t count = attention.R * attention.Hq * splits_of(attention);
  Scratch scratch(nullptr);
  with_element_type(attention.dtype, [&](auto element) {
    for (const int64_t elements : {count, count, count * attention.D}) {
      scratch.take<Accumulator<decltype(element)>>(elements);
    }
  });
  return scratch.bytes();
}

void decode_attention(const DecodeAttention& attention, void* scratch, void* output, void* stream) {
  const int64_t R = attention.R, Hq = attention.Hq, C = attention.C, D = attention.D;
  with_element_type(attention.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    attend_of<T>(attention)(attention, Scratch(scratch), stream);
    launch(combine_kernel<T>, grid(R * Hq, ceil_div(D, kWarpSize)), dim3(kWarpSize, kWarps), stream,
           split_results<Input<A>, A>(attention, Scratch(scratch)),
           Seen{{attention.begin, R}, {attention.end, R}, C}, Hq, D, Output<T>(output, R * Hq * D));
  });
}

}  // namespace firstlm::cuda
