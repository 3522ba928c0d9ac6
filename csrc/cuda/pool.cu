// Pooling of the prompt's hidden states, and its adjoint. Letters as in ../router.h.
//
// The tokens of a window are cut in parts of a fixed size, so that a long prompt of one sequence
// fills the device: one kernel sums the parts, another adds them up. Tokens are counted among the
// row's prompt tokens: padding moves nothing, and the result does not change by a bit.
#include <type_traits>

#include "compact.cuh"
#include "element.cuh"
#include "launchers.h"
#include "scratch.h"
#include "span.cuh"

namespace firstlm::cuda {
namespace {

constexpr int kTokensPerPart = 128;
constexpr int kTokenLanes = 8;  // tokens that a block reads at once, a warp each
constexpr int kFinishThreads = 128;

// The largest i in [0, count) for which holds(i), which is true for 0 and falls to false once.
template <class Holds>
__device__ int64_t last_that(int64_t count, const Holds& holds) {
  int64_t begin = 0, end = count;
  while (end - begin > 1) {
    const int64_t middle = (begin + end) / 2;
    (holds(middle) ? begin : end) = middle;
  }
  return begin;
}

// Where the prompt tokens of every row lie.
struct PromptTokens {
  int64_t B, T;
  int64_t stride_B, stride_T;  // of the hidden states
  Input<int32_t> positions;    // [B, T]: those of the n prompt tokens, then those of the others
  Input<int32_t> counts;       // [B]

  __device__ int64_t count(int64_t b) const { return counts.load(b); }
  // Tokens of the rows before.
  __device__ int64_t before(int64_t b) const { return b * T; }
  __device__ int64_t element(int64_t b, int64_t rank) const {
    return b * stride_B + positions.load(b * T + rank) * stride_T;
  }
};

// Parts have places in one list, computed without a look at other rows: the parts of window w of
// row b begin at first_part(), and enough places follow for all of them. Some stay empty.
struct Parts {
  Pooling pooling;

  int64_t places(int64_t B, int64_t tokens) const {
    return tokens / kTokensPerPart + B * pooling.W();
  }

  template <class Tokens>
  __device__ int64_t first_of_row(const Tokens& tokens, int64_t b) const {
    return tokens.before(b) / kTokensPerPart + b * pooling.W();
  }

  // Counted from the row's first place.
  __device__ int64_t first_of_window(int64_t w, int64_t n) const {
    const int64_t ahead = pooled_range(pooling, w, n).begin - pooled_range(pooling, 0, n).begin;
    return ahead / kTokensPerPart + w;
  }
};

struct Part {
  int64_t b, begin, end;  // the row, and the ranks of its prompt tokens
};

template <class Tokens>
__device__ Part part_at(const Parts& parts, const Tokens& tokens, int64_t place) {
  const int64_t b =
      last_that(tokens.B, [&](int64_t row) { return parts.first_of_row(tokens, row) <= place; });
  const int64_t n = tokens.count(b);
  if (n == 0) return {b, 0, 0};
  place -= parts.first_of_row(tokens, b);
  const int64_t w = last_that(
      parts.pooling.W(), [&](int64_t window) { return parts.first_of_window(window, n) <= place; });
  const TokenRange range = pooled_range(parts.pooling, w, n);
  const int64_t begin = range.begin + (place - parts.first_of_window(w, n)) * kTokensPerPart;
  return {b, begin, smaller(begin + kTokensPerPart, range.end)};
}

// One block a part and 32 packs of columns.
template <class T, int kPack, class Tokens>
__global__ void __launch_bounds__(kTokenLanes* kWarpSize)
    sum_parts_kernel(Input<T> hidden, Tokens tokens, Parts parts, int64_t D,
                     InOut<Accumulator<T>> sums) {
  __shared__ Shared<Accumulator<T>, kPack * kTokenLanes * kWarpSize> partial;
  const int lane = threadIdx.x, token_lane = threadIdx.y;
  const int64_t place = blockIdx.x;
  const int64_t column = (int64_t{blockIdx.y} * kWarpSize + lane) * kPack;
  const Part part = part_at(parts, tokens, place);
  if (part.begin >= part.end) return;

  Accumulator<T> mine[kPack] = {};
  if (column < D) {
#pragma unroll 4
    for (int64_t rank = part.begin + token_lane; rank < part.end; rank += kTokenLanes) {
      const Pack<T, kPack> pack =
          hidden.template load_pack<kPack>(tokens.element(part.b, rank) + column);
      for (int e = 0; e < kPack; ++e) mine[e] += to_accumulator(pack.values[e]);
    }
  }
  for (int e = 0; e < kPack; ++e) {
    partial.set((e * kTokenLanes + token_lane) * kWarpSize + lane, mine[e]);
  }
  __syncthreads();
  if (column >= D) return;
  for (int e = token_lane; e < kPack; e += kTokenLanes) {
    Accumulator<T> sum = 0;
    for (int i = 0; i < kTokenLanes; ++i) {
      sum += partial.get((e * kTokenLanes + i) * kWarpSize + lane);
    }
    sums.store(place * D + column + e, sum);
  }
}

// One block a feature [b, w] and kFinishThreads columns.
template <class A, class Tokens>
__global__ void __launch_bounds__(kFinishThreads)
    finish_pool_kernel(Input<A> sums, Tokens tokens, Parts parts, int64_t D, Output<A> pooled) {
  const int64_t W = parts.pooling.W();
  const int64_t b = blockIdx.x / W, w = blockIdx.x % W;
  const int64_t column = int64_t{blockIdx.y} * kFinishThreads + threadIdx.x;
  if (column >= D) return;
  const int64_t n = tokens.count(b);
  A mean = 0;
  if (n > 0) {
    const int64_t length = pooled_range(parts.pooling, w, n).size();
    const int64_t first = parts.first_of_row(tokens, b) + parts.first_of_window(w, n);
    const int64_t end = first + ceil_div(length, kTokensPerPart);
    for (int64_t place = first; place < end; ++place) mean += sums.load(place * D + column);
    mean /= static_cast<A>(length);
  }
  pooled.store(blockIdx.x * D + column, mean);
}

// N elements, read in the widest accesses that their type allows; one by one if N is 1.
template <int N, class A>
__device__ void load_elements(const Input<A>& from, int64_t i, A* to) {
  constexpr int kStep = N < kMaxPack<A> ? N : kMaxPack<A>;
  for (int e = 0; e < N; e += kStep) {
    const Pack<A, kStep> pack = from.template load_pack<kStep>(i + e);
    for (int j = 0; j < kStep; ++j) to[e + j] = pack.values[j];
  }
}

// What gradient the prompt token of that rank gets in columns column … column + kPack - 1.
template <class T, int kPack>
__device__ Pack<T, kPack> unpool(const Input<Accumulator<T>>& grad_pooled, Pooling pooling,
                                 WindowRange windows, int64_t b, int64_t n, int64_t column,
                                 int64_t D) {
  using A = Accumulator<T>;
  A sums[kPack] = {};
  for (int64_t w = windows.begin; w < windows.end; ++w) {
    const A length = static_cast<A>(pooled_range(pooling, w, n).size());
    A grad[kPack];
    load_elements<kPack>(grad_pooled, (b * pooling.W() + w) * D + column, grad);
    for (int e = 0; e < kPack; ++e) sums[e] += grad[e] / length;
  }
  Pack<T, kPack> pack;
  for (int e = 0; e < kPack; ++e) pack.values[e] = from_accumulator<T>(sums[e]);
  return pack;
}

// A warp a token, kTokenLanes of them a block; tokens in the order of PromptTokens::positions.
template <class T, int kPack>
__global__ void __launch_bounds__(kTokenLanes* kWarpSize)
    unpool_kernel(Input<Accumulator<T>> grad_pooled, PromptTokens tokens, Pooling pooling,
                  int64_t D, Output<T> grad_hidden) {
  const int64_t place = int64_t{blockIdx.x} * kTokenLanes + threadIdx.y;
  if (place >= tokens.B * tokens.T) return;
  const int64_t b = place / tokens.T, rank = place % tokens.T;
  const int64_t n = tokens.count(b);
  const WindowRange windows = rank < n ? windows_of(pooling, rank, n) : WindowRange{0, 0};
  const int64_t to = tokens.element(b, rank);
  for (int64_t column = threadIdx.x * kPack; column < D; column += kWarpSize * kPack) {
    grad_hidden.store_pack(to + column,
                           unpool<T, kPack>(grad_pooled, pooling, windows, b, n, column, D));
  }
}

// --- Launchers
// ------------------------------------------------------------------------------------

struct MaskScratch {
  int32_t* positions;  // [B, T]
  int32_t* counts;     // [B]

  MaskScratch(Scratch& scratch, const HiddenStates& hidden)
      : positions(scratch.take<int32_t>(hidden.B * hidden.T)),
        counts(scratch.take<int32_t>(hidden.B)) {}
};

PromptTokens find_prompt_tokens(const HiddenStates& hidden, const bool* prompt_mask,
                                const MaskScratch& scratch, void* stream) {
  const int64_t B = hidden.B, T = hidden.T;
  compact<int32_t, int32_t, true>({{prompt_mask, B * T}, T, T, 1}, B, scratch.positions,
                                  scratch.counts, stream);
  return {B, T, hidden.stride_B, hidden.stride_T, {scratch.positions, B * T}, {scratch.counts, B}};
}

int64_t places_of(const HiddenStates& hidden, Pooling pooling) {
  return Parts{pooling}.places(hidden.B, hidden.B * hidden.T);
}

// Elements from the first to the last one.
int64_t extent(const HiddenStates& hidden) {
  if (hidden.B == 0 || hidden.T == 0) return 0;
  return (hidden.B - 1) * hidden.stride_B + (hidden.T - 1) * hidden.stride_T + hidden.D;
}

template <class T>
bool fits_packs(const HiddenStates& hidden) {
  constexpr int64_t kPack = kMaxPack<T>;
  return hidden.D % kPack == 0 && hidden.stride_B % kPack == 0 && hidden.stride_T % kPack == 0 &&
         is_aligned(hidden.data);
}

template <class T, int kPack>
void run_pool(const HiddenStates& hidden, const PromptTokens& tokens, Pooling pooling, void* sums,
              void* pooled, void* stream) {
  using A = Accumulator<T>;
  const int64_t D = hidden.D, W = pooling.W(), places = places_of(hidden, pooling);
  const Parts parts{pooling};
  launch(sum_parts_kernel<T, kPack, PromptTokens>, dim3(places, ceil_div(D, kPack * kWarpSize)),
         dim3(kWarpSize, kTokenLanes), stream, Input<T>(hidden.data, extent(hidden)), tokens, parts,
         D, InOut<A>(sums, places * D));
  launch(finish_pool_kernel<A, PromptTokens>, dim3(hidden.B * W, ceil_div(D, kFinishThreads)),
         kFinishThreads, stream, Input<A>(sums, places * D), tokens, parts, D,
         Output<A>(pooled, hidden.B * W * D));
}

template <class T, int kPack>
void run_unpool(const HiddenStates& hidden, const PromptTokens& tokens, Pooling pooling,
                const void* grad_pooled, void* grad_hidden, void* stream) {
  const int64_t count = hidden.B * hidden.T, D = hidden.D;
  launch(unpool_kernel<T, kPack>, ceil_div(count, kTokenLanes), dim3(kWarpSize, kTokenLanes),
         stream, Input<Accumulator<T>>(grad_pooled, hidden.B * pooling.W() * D), tokens, pooling, D,
         Output<T>(grad_hidden, count * D));
}

}  // namespace

int64_t router_pool_scratch(const HiddenStates& hidden, Pooling pooling) {
  Scratch scratch(nullptr);
  MaskScratch(scratch, hidden);
  scratch.take<double>(places_of(hidden, pooling) * hidden.D);
  return scratch.bytes();
}

void router_pool(const HiddenStates& hidden, const bool* prompt_mask, Pooling pooling,
                 void* scratch_memory, void* pooled, void* stream) {
  Scratch scratch(scratch_memory);
  const PromptTokens tokens =
      find_prompt_tokens(hidden, prompt_mask, MaskScratch(scratch, hidden), stream);
  with_element_type(hidden.dtype, [&](auto element) {
    using T = decltype(element);
    void* sums = scratch.take<double>(places_of(hidden, pooling) * hidden.D);
    const auto run = fits_packs<T>(hidden) ? run_pool<T, kMaxPack<T>> : run_pool<T, 1>;
    run(hidden, tokens, pooling, sums, pooled, stream);
  });
}

int64_t router_pool_backward_scratch(const HiddenStates& hidden) {
  Scratch scratch(nullptr);
  MaskScratch(scratch, hidden);
  return scratch.bytes();
}

void router_pool_backward(const HiddenStates& hidden, const bool* prompt_mask, Pooling pooling,
                          const void* grad_pooled, void* scratch_memory, void* grad_hidden,
                          void* stream) {
  Scratch scratch(scratch_memory);
  const PromptTokens tokens =
      find_prompt_tokens(hidden, prompt_mask, MaskScratch(scratch, hidden), stream);
  with_element_type(hidden.dtype, [&](auto element) {
    using T = decltype(element);
    const bool fits = fits_packs<T>(hidden) && is_aligned(grad_pooled) && is_aligned(grad_hidden);
    const auto run = fits ? run_unpool<T, kMaxPack<T>> : run_unpool<T, 1>;
    run(hidden, tokens, pooling, grad_pooled, grad_hidden, stream);
  });
}

}  // namespace firstlm::cuda
