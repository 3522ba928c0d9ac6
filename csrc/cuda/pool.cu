// Pooling of the prompt's hidden states, masked or packed, and its adjoint. Letters as in
// ../router.h.
//
// The tokens of a window are cut in parts of a fixed size, so that a long prompt of one sequence
// fills the device: one kernel sums the parts, another adds them up. Tokens are counted among the
// row's prompt tokens: padding moves nothing, and the result does not change by a bit.
#include <type_traits>

#include "compact.cuh"
#include "copy.cuh"
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

// A token by its row, and by its rank among the row's prompt tokens; those of other tokens follow.
struct TokenName {
  int64_t b, rank;
};

// Where the prompt tokens of every row lie, in padded rows.
struct MaskedTokens {
  int64_t B, T;
  int64_t stride_B, stride_T;  // of the hidden states
  Input<int32_t> positions;    // [B, T]: those of the n prompt tokens, then those of the others
  Input<int32_t> counts;       // [B]

  __host__ __device__ int64_t total() const { return B * T; }
  __device__ int64_t count(int64_t b) const { return counts.load(b); }
  // Tokens of the rows before.
  __device__ int64_t before(int64_t b) const { return b * T; }
  __device__ int64_t element(TokenName token) const {
    return token.b * stride_B + positions.load(token.b * T + token.rank) * stride_T;
  }
  // All tokens, in some order.
  __device__ TokenName name(int64_t i) const { return {i / T, i % T}; }
};

// In rows one after the other. Whatever the offsets hold, no token is sought outside [0, N).
struct PackedTokens {
  int64_t B, N;
  int64_t stride_N;        // of the hidden states
  Input<int64_t> offsets;  // [B + 1]

  __host__ __device__ int64_t total() const { return N; }
  __device__ int64_t before(int64_t b) const { return larger(smaller(offsets.load(b), N), 0); }
  __device__ int64_t count(int64_t b) const { return larger(before(b + 1) - before(b), 0); }
  __device__ int64_t element(TokenName token) const {
    return (before(token.b) + token.rank) * stride_N;
  }
  __device__ TokenName name(int64_t i) const {
    const int64_t b = last_that(B, [&](int64_t row) { return before(row) <= i; });
    return {b, i - before(b)};
  }
};

// Parts have places in one list, computed without a look at other rows: the parts of window w of
// row b begin at first_part(), and enough places follow for all of them. Some stay empty.
struct Parts {
  Pooling pooling;

  int64_t places(int64_t B, int64_t tokens) const {
    return B == 0 ? 0 : tokens / kTokensPerPart + B * pooling.W();
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
  const int64_t before = larger(place - parts.first_of_window(w, n), 0);
  const int64_t begin = range.begin + before * kTokensPerPart;
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
          hidden.template load_pack<kPack>(tokens.element({part.b, rank}) + column);
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

// A warp a token, kTokenLanes of them a block.
template <class T, int kPack, class Tokens>
__global__ void __launch_bounds__(kTokenLanes* kWarpSize)
    unpool_kernel(Input<Accumulator<T>> grad_pooled, Tokens tokens, Pooling pooling, int64_t D,
                  Output<T> grad_hidden) {
  const int64_t i = int64_t{blockIdx.x} * kTokenLanes + threadIdx.y;
  if (i >= tokens.total()) return;
  const TokenName token = tokens.name(i);
  const int64_t n = tokens.B == 0 ? 0 : tokens.count(token.b), to = tokens.element(token);
  const bool is_prompt = token.rank >= 0 && token.rank < n;
  const WindowRange windows = is_prompt ? windows_of(pooling, token.rank, n) : WindowRange{0, 0};
  for (int64_t column = threadIdx.x * kPack; column < D; column += kWarpSize * kPack) {
    grad_hidden.store_pack(to + column,
                           unpool<T, kPack>(grad_pooled, pooling, windows, token.b, n, column, D));
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

MaskedTokens find_prompt_tokens(const HiddenStates& hidden, const bool* prompt_mask,
                                const MaskScratch& scratch, void* stream) {
  const int64_t B = hidden.B, T = hidden.T;
  compact<int32_t, int32_t, true>({{prompt_mask, B * T}, T, T, 1}, B, scratch.positions,
                                  scratch.counts, stream);
  return {B, T, hidden.stride_B, hidden.stride_T, {scratch.positions, B * T}, {scratch.counts, B}};
}

PackedTokens packed_tokens(const PackedStates& hidden) {
  return {hidden.B, hidden.N, hidden.stride_N, {hidden.offsets, hidden.B + 1}};
}

// Hidden states of any layout: `extent` elements from the first to the last one.
struct States {
  const void* data;
  DType dtype;
  int64_t D, extent;
  Alignment alignment;
};

States states_of(const HiddenStates& hidden) {
  const bool is_empty = hidden.B == 0 || hidden.T == 0;
  const int64_t extent =
      (hidden.B - 1) * hidden.stride_B + (hidden.T - 1) * hidden.stride_T + hidden.D;
  const int64_t size = size_of(hidden.dtype);
  Alignment alignment;
  alignment.address(hidden.data)
      .distance(hidden.D * size)
      .distance(hidden.stride_B * size)
      .distance(hidden.stride_T * size);
  return {hidden.data, hidden.dtype, hidden.D, is_empty ? 0 : extent, alignment};
}

States states_of(const PackedStates& hidden) {
  const int64_t extent = hidden.N == 0 ? 0 : (hidden.N - 1) * hidden.stride_N + hidden.D;
  const int64_t size = size_of(hidden.dtype);
  Alignment alignment;
  alignment.address(hidden.data).distance(hidden.D * size).distance(hidden.stride_N * size);
  return {hidden.data, hidden.dtype, hidden.D, extent, alignment};
}

// As many sums as there can be parts, from where `scratch` has got to.
void* take_sums(Scratch& scratch, DType dtype, int64_t B, int64_t tokens, int64_t D,
                Pooling pooling) {
  const int64_t count = Parts{pooling}.places(B, tokens) * D;
  return dtype == DType::kFloat64 ? static_cast<void*>(scratch.take<double>(count))
                                  : scratch.take<float>(count);
}

template <class T, int kPack, class Tokens>
void run_pool(const States& hidden, const Tokens& tokens, Pooling pooling, void* sums, void* pooled,
              void* stream) {
  using A = Accumulator<T>;
  const Parts parts{pooling};
  const int64_t D = hidden.D, features = tokens.B * pooling.W();
  const int64_t places = parts.places(tokens.B, tokens.total());
  launch(sum_parts_kernel<T, kPack, Tokens>, grid(places, ceil_div(D, kPack * kWarpSize)),
         dim3(kWarpSize, kTokenLanes), stream, Input<T>(hidden.data, hidden.extent), tokens, parts,
         D, InOut<A>(sums, places * D));
  launch(finish_pool_kernel<A, Tokens>, grid(features, ceil_div(D, kFinishThreads)), kFinishThreads,
         stream, Input<A>(sums, places * D), tokens, parts, D, Output<A>(pooled, features * D));
}

template <class Tokens>
void pool(const States& hidden, const Tokens& tokens, Pooling pooling, void* sums, void* pooled,
          void* stream) {
  with_element_type(hidden.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run =
        hidden.alignment.fits_packs() ? run_pool<T, kMaxPack<T>, Tokens> : run_pool<T, 1, Tokens>;
    run(hidden, tokens, pooling, sums, pooled, stream);
  });
}

template <class T, int kPack, class Tokens>
void run_unpool(const States& hidden, const Tokens& tokens, Pooling pooling,
                const void* grad_pooled, void* grad_hidden, void* stream) {
  const int64_t D = hidden.D;
  launch(unpool_kernel<T, kPack, Tokens>, grid(ceil_div(tokens.total(), kTokenLanes)),
         dim3(kWarpSize, kTokenLanes), stream,
         Input<Accumulator<T>>(grad_pooled, tokens.B * pooling.W() * D), tokens, pooling, D,
         Output<T>(grad_hidden, tokens.total() * D));
}

template <class Tokens>
void unpool(States hidden, const Tokens& tokens, Pooling pooling, const void* grad_pooled,
            void* grad_hidden, void* stream) {
  hidden.alignment.address(grad_pooled).address(grad_hidden);
  with_element_type(hidden.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = hidden.alignment.fits_packs() ? run_unpool<T, kMaxPack<T>, Tokens>
                                                   : run_unpool<T, 1, Tokens>;
    run(hidden, tokens, pooling, grad_pooled, grad_hidden, stream);
  });
}

}  // namespace

int64_t router_pool_scratch(const HiddenStates& hidden, Pooling pooling) {
  Scratch scratch(nullptr);
  MaskScratch(scratch, hidden);
  take_sums(scratch, hidden.dtype, hidden.B, hidden.B * hidden.T, hidden.D, pooling);
  return scratch.bytes();
}

void router_pool(const HiddenStates& hidden, const bool* prompt_mask, Pooling pooling,
                 void* scratch_memory, void* pooled, void* stream) {
  Scratch scratch(scratch_memory);
  const MaskedTokens tokens =
      find_prompt_tokens(hidden, prompt_mask, MaskScratch(scratch, hidden), stream);
  void* sums = take_sums(scratch, hidden.dtype, hidden.B, hidden.B * hidden.T, hidden.D, pooling);
  pool(states_of(hidden), tokens, pooling, sums, pooled, stream);
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
  const MaskedTokens tokens =
      find_prompt_tokens(hidden, prompt_mask, MaskScratch(scratch, hidden), stream);
  unpool(states_of(hidden), tokens, pooling, grad_pooled, grad_hidden, stream);
}

int64_t router_pool_packed_scratch(const PackedStates& hidden, Pooling pooling) {
  Scratch scratch(nullptr);
  take_sums(scratch, hidden.dtype, hidden.B, hidden.N, hidden.D, pooling);
  return scratch.bytes();
}

void router_pool_packed(const PackedStates& hidden, Pooling pooling, void* scratch, void* pooled,
                        void* stream) {
  pool(states_of(hidden), packed_tokens(hidden), pooling, scratch, pooled, stream);
}

void router_pool_packed_backward(const PackedStates& hidden, Pooling pooling,
                                 const void* grad_pooled, void* grad_hidden, void* stream) {
  unpool(states_of(hidden), packed_tokens(hidden), pooling, grad_pooled, grad_hidden, stream);
}

}  // namespace firstlm::cuda
