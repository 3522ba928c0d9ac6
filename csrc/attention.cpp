#include "attention.h"

#include <algorithm>
#include <cstring>

#include "arithmetic.h"
#include "parallel.h"

namespace firstlm {
namespace {

int64_t splits_of(int64_t slots) { return ceil_div(slots, kSlotsPerSplit); }

// Parts of the scratch; S splits, as many as the longest row has.
template <class Sum>
struct Scratch {
  int64_t S, D_padded;
  Sum* queries;  // [R, Hq, padded D]
  Sum* sums;     // [R, Hq, S, padded D]
  Sum* maxima;   // [R, Hq, S]
  Sum* totals;   // [R, Hq, S]

  Scratch(const DecodeAttention& attention, void* scratch)
      : S(attention.max_splits()), D_padded(padded_head_dim(attention.D)) {
    const int64_t heads = attention.R * attention.Hq;
    queries = static_cast<Sum*>(scratch);
    sums = queries + heads * D_padded;
    maxima = sums + heads * S * D_padded;
    totals = maxima + heads * S;
  }
};

template <class T>
const T* slot(const CacheView& cache, int64_t r, int64_t h, int64_t c) {
  return static_cast<const T*>(cache.data) + r * cache.stride_R + h * cache.stride_H +
         c * cache.stride_C;
}

template <class T>
void widen_queries(const DecodeAttention& attention, const Scratch<Accumulator<T>>& scratch) {
  Accumulator<T>* to = scratch.queries;
  for (int64_t r = 0; r < attention.R; ++r) {
    for (int64_t h = 0; h < attention.Hq; ++h, to += scratch.D_padded) {
      const T* from =
          static_cast<const T*>(attention.query) + r * attention.stride_R + h * attention.stride_H;
      for (int64_t d = 0; d < attention.D; ++d) to[d] = widen(from[d]);
      std::fill(to + attention.D, to + scratch.D_padded, Accumulator<T>(0));
    }
  }
}

// Splits [s, end_of_run) of a row are taken one after the other by the same thread.
template <class T>
void attend_split(const Kernels& kernels, const DecodeAttention& attention,
                  const Scratch<Accumulator<T>>& scratch, int64_t r, int64_t h, int64_t s,
                  int64_t end_of_run) {
  const int64_t first = attention.begin[r] + s * kSlotsPerSplit, end = attention.end[r];
  const int64_t slots = std::min(kSlotsPerSplit, end - first);
  const int64_t left = s + 1 < end_of_run ? end - first - slots : 0;
  const int64_t head = r * attention.Hq + h * attention.G();  // the first of the group
  const int64_t S = scratch.S, D_padded = scratch.D_padded;
  kernels.attend[static_cast<int>(attention.dtype)]({
      .G = attention.G(),
      .D = attention.D,
      .slots = slots,
      .next_slots = std::min(kSlotsPerSplit, left),
      .queries = scratch.queries + head * D_padded,
      .keys = slot<T>(attention.keys, r, h, first),
      .values = slot<T>(attention.values, r, h, first),
      .stride_keys = attention.keys.stride_C,
      .stride_values = attention.values.stride_C,
      .scale = attention.scale,
      .soft_cap = attention.soft_cap,
      .stride_totals = S,
      .stride_sums = S * D_padded,
      .maxima = scratch.maxima + head * S + s,
      .totals = scratch.totals + head * S + s,
      .sums = scratch.sums + (head * S + s) * D_padded,
  });
}

// Splits are handed out in runs: within one the next keys are prefetched. Eight runs a thread are
// enough for the threads to end together.
template <class T>
void attend_all(const Kernels& kernels, const DecodeAttention& attention, int threads,
                const Scratch<Accumulator<T>>& scratch) {
  constexpr int64_t kRunsPerThread = 8;
  const int64_t S = scratch.S, H = attention.H, groups = attention.R * H;
  const int team = threads_for(attention.cache_bytes(), threads);
  const int64_t splits_per_run = std::max<int64_t>(groups * S / (kRunsPerThread * team), 1);
  const int64_t runs = ceil_div(S, splits_per_run);
  parallel_for(groups * runs, team, [&](int64_t item) {
    const int64_t group = item / runs, r = group / H;
    const int64_t first = item % runs * splits_per_run;
    const int64_t end =
        std::min(first + splits_per_run, splits_of(attention.end[r] - attention.begin[r]));
    for (int64_t s = first; s < end; ++s) {
      attend_split<T>(kernels, attention, scratch, r, group % H, s, end);
    }
  });
}

template <class T>
void merge_head(const Kernels& kernels, const DecodeAttention& attention,
                const Scratch<Accumulator<T>>& scratch, int64_t head, T* output) {
  const int64_t r = head / attention.Hq, S = scratch.S;
  const int64_t splits = splits_of(attention.end[r] - attention.begin[r]);
  if (splits == 0) {
    std::memset(output, 0, attention.D * sizeof(T));
    return;
  }
  kernels.merge_splits[static_cast<int>(attention.dtype)]({
      .splits = splits,
      .D = attention.D,
      .maxima = scratch.maxima + head * S,
      .totals = scratch.totals + head * S,
      .sums = scratch.sums + head * S * scratch.D_padded,
      .output = output,
  });
}

}  // namespace

int64_t DecodeAttention::cache_bytes() const {
  int64_t slots = 0;
  for (int64_t r = 0; r < R; ++r) slots += end[r] - begin[r];
  return 2 * slots * H * D * size_of(dtype);
}

int64_t DecodeAttention::max_splits() const {
  int64_t splits = 0;
  for (int64_t r = 0; r < R; ++r) splits = std::max(splits, splits_of(end[r] - begin[r]));
  return splits;
}

int64_t find_misfit(const int64_t* begin, const int64_t* end, int64_t R, int64_t C) {
  int64_t r = 0;
  while (r < R && 0 <= begin[r] && begin[r] <= end[r] && end[r] <= C) ++r;
  return r;
}

int64_t scratch_elements(const DecodeAttention& attention) {
  const int64_t D_padded = padded_head_dim(attention.D);
  return attention.R * attention.Hq * (D_padded + attention.max_splits() * (D_padded + 2));
}

void decode_attention(const Kernels& kernels, const DecodeAttention& attention, int threads,
                      void* scratch_data, void* output) {
  const int64_t heads = attention.R * attention.Hq, D = attention.D;
  with_element_type(attention.dtype, [&](auto element) {
    using T = decltype(element);
    const Scratch<Accumulator<T>> scratch(attention, scratch_data);
    widen_queries<T>(attention, scratch);
    attend_all<T>(kernels, attention, threads, scratch);
    const int64_t S = scratch.S;
    const int64_t partial_bytes = heads * S * scratch.D_padded * int64_t(sizeof(Accumulator<T>));
    parallel_for(heads, threads_for(partial_bytes, threads), [&](int64_t head) {
      merge_head<T>(kernels, attention, scratch, head, static_cast<T*>(output) + head * D);
    });
  });
}

}  // namespace firstlm
