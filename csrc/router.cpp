#include "router.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>

#include "arithmetic.h"
#include "parallel.h"

namespace firstlm {
namespace {

// Sums of one block stay in L1 beside the rows that stream through it.
constexpr int64_t kMaxBlock = 1024;
// Where whole rows are read one after the other, a block may be as wide as this.
constexpr int64_t kMaxRow = 4096;

// Prompt tokens of a window that are summed on their own, before the sums are added in their order:
// a sum depends on nothing but the window's tokens. Long enough to be read as one stream.
constexpr int64_t kRanksPerBlock = 128;
// Runs of blocks that a thread takes at once are this long where there are enough of them: the
// longer, the fewer starts of streams; but no thread should wait long for another.
constexpr int64_t kPieceBytes = 256 * 1024;
constexpr int64_t kPiecesPerThread = 4;

// Rows are split in blocks of columns where there are fewer of them than threads, and no further:
// the wider a block, the longer the pieces of memory that are read in order.
struct ColumnBlocks {
  int64_t D, width, count;

  ColumnBlocks(int64_t B, int64_t D, int64_t max_width, int threads) : D(D) {
    constexpr int64_t kMultiple = 32;
    const int64_t blocks_per_row = ceil_div(threads, std::max<int64_t>(B, 1));
    width = std::min(ceil_div(D, blocks_per_row), max_width);
    width = std::max<int64_t>(ceil_div(width, kMultiple), 1) * kMultiple;
    count = ceil_div(D, width);
  }

  int64_t begin(int64_t block) const { return block * width; }
  int64_t size(int64_t block) const { return std::min(width, D - block * width); }
};

// The tokens of one sequence.
template <class T>
struct Tokens {
  T* data;         // [count, D]
  int64_t stride;  // elements from token to token
  int64_t count;
  const bool* mask;  // [count], true for the prompt's; null: all are the prompt's

  bool is_prompt(int64_t position) const { return !mask || mask[position]; }
  int64_t prompt_tokens() const { return mask ? std::count(mask, mask + count, true) : count; }
};

// The W windows of n > 0 prompt tokens in K blocks each, the last of which may be empty.
struct RankBlocks {
  Pooling pooling;
  int64_t n, K;

  RankBlocks(Pooling pooling, int64_t n) : pooling(pooling), n(n), K(per_window(pooling, n)) {}

  // Rises with n.
  static int64_t per_window(Pooling pooling, int64_t n) {
    if (pooling.kind == PoolKind::kLast) return 1;
    return std::max<int64_t>(ceil_div(ceil_div(n, pooling.W()), kRanksPerBlock), 1);
  }

  int64_t count() const { return pooling.W() * K; }
  TokenRange window(int64_t w) const { return pooled_range(pooling, w, n); }
  TokenRange block(int64_t w, int64_t k) const {
    const TokenRange whole = window(w);
    const int64_t begin = whole.begin + k * kRanksPerBlock;
    return {begin, std::min(begin + kRanksPerBlock, whole.end)};
  }
};

// Walks over the prompt tokens of one sequence.
template <class T>
struct PromptCursor {
  const Tokens<T>& tokens;
  int64_t position = 0;  // in the sequence
  int64_t rank = 0;      // among prompt tokens

  explicit PromptCursor(const Tokens<T>& tokens) : tokens(tokens) { skip_others(); }

  void advance() {
    ++position;
    ++rank;
    skip_others();
  }

  // To a rank that the sequence has, not before the present one.
  void advance_to(int64_t wanted) {
    if (!tokens.mask) {
      position = rank = wanted;
      return;
    }
    constexpr int64_t kStride = 256;
    while (rank < wanted) {
      const bool* next = tokens.mask + position;
      const int64_t stride = std::min(kStride, tokens.count - position);
      const int64_t passed = std::count(next, next + stride, true);
      if (rank + passed > wanted) break;
      position += stride;
      rank += passed;
    }
    skip_others();
    while (rank < wanted) advance();
  }

  const T* states() const { return tokens.data + position * tokens.stride; }

 private:
  // Called only while a prompt token is left.
  void skip_others() {
    while (!tokens.is_prompt(position)) ++position;
  }
};

// How rows are read: `at_once` of them, while what lies `ahead` of them is fetched.
struct Reading {
  int at_once;
  RowsAhead ahead;

  template <class T>
  static Reading of(const Tokens<const T>& tokens, int64_t width) {
    constexpr int64_t kStreamAhead = 8192;      // bytes: what memory delivers within its latency
    constexpr int64_t kGroupBytes = 16 * 1024;  // that L1 holds beside what is fetched and the sums
    const int64_t row_bytes = tokens.stride * static_cast<int64_t>(sizeof(T));
    if (width != tokens.stride) return {kRowsPerPass, {kRowsPerPass * row_bytes, false}};
    const int64_t at_once = std::clamp<int64_t>(kGroupBytes / row_bytes, 1, kRowsPerPass);
    const int64_t group_bytes = at_once * row_bytes;
    const int64_t groups_ahead = ceil_div(kStreamAhead, group_bytes);
    return {static_cast<int>(at_once), {groups_ahead * group_bytes, true}};
  }
};

// sums [width] = the sum of the tokens of those ranks, in their order.
template <class T>
void sum_ranks(AddRows add_rows, PromptCursor<const T>& token, TokenRange ranks, Reading reading,
               int64_t width, Accumulator<T>* sums) {
  std::fill_n(sums, width, Accumulator<T>(0));
  const void* rows[kRowsPerPass];
  int pending = 0;
  token.advance_to(ranks.begin);
  while (true) {
    rows[pending++] = token.states();
    const bool is_last = token.rank + 1 == ranks.end;
    if (pending == reading.at_once || is_last) {
      add_rows(rows, pending, width, reading.ahead, sums);
      pending = 0;
    }
    if (is_last) break;  // stay on it: the next window may begin with the same token
    token.advance();
  }
}

template <class T>
void make_mean(const RankBlocks& blocks, int64_t w, int64_t width, Accumulator<T>* sums) {
  const auto length = static_cast<Accumulator<T>>(blocks.window(w).size());
  for (int64_t i = 0; i < width; ++i) sums[i] /= length;
}

// Where some columns of one sequence are pooled.
template <class T>
struct PooledColumns {
  AddRows add_rows;
  Pooling pooling;
  int64_t D, width;
  Accumulator<T>* pooled;  // [W, D]
  Accumulator<T>* later;   // [W, K - 1, D]: sums of the blocks after a window's first one

  Accumulator<T>* of_block(const RankBlocks& blocks, int64_t w, int64_t k) const {
    return k == 0 ? pooled + w * D : later + (w * (blocks.K - 1) + k - 1) * D;
  }

  // One thread alone: no sums but those of one block.
  void pool(const Tokens<const T>& tokens) const {
    const RankBlocks blocks(pooling, tokens.prompt_tokens());
    if (blocks.n == 0) return clear();
    const Reading reading = Reading::of(tokens, width);
    PromptCursor<const T> token(tokens);
    Accumulator<T> sums[kMaxRow];
    for (int64_t w = 0; w < pooling.W(); ++w) {
      Accumulator<T>* total = pooled + w * D;
      sum_ranks(add_rows, token, blocks.block(w, 0), reading, width, total);
      for (int64_t k = 1; k < blocks.K && blocks.block(w, k).size() > 0; ++k) {
        sum_ranks(add_rows, token, blocks.block(w, k), reading, width, sums);
        add(sums, total);
      }
      make_mean<T>(blocks, w, width, total);
    }
  }

  // Several threads: each sums some of the blocks, ...
  void sum_piece(const Tokens<const T>& tokens, int64_t piece, int64_t pieces) const {
    const RankBlocks blocks(pooling, tokens.prompt_tokens());
    if (blocks.n == 0) return;
    const Reading reading = Reading::of(tokens, width);
    PromptCursor<const T> token(tokens);
    const int64_t end = (piece + 1) * blocks.count() / pieces;
    for (int64_t i = piece * blocks.count() / pieces; i < end; ++i) {
      const int64_t w = i / blocks.K, k = i % blocks.K;
      const TokenRange ranks = blocks.block(w, k);
      if (ranks.size() <= 0) continue;
      sum_ranks(add_rows, token, ranks, reading, width, of_block(blocks, w, k));
    }
  }

  // ... and then the sums are added.
  void add_blocks(const Tokens<const T>& tokens) const {
    const RankBlocks blocks(pooling, tokens.prompt_tokens());
    if (blocks.n == 0) return clear();
    for (int64_t w = 0; w < pooling.W(); ++w) {
      Accumulator<T>* total = pooled + w * D;
      for (int64_t k = 1; k < blocks.K && blocks.block(w, k).size() > 0; ++k) {
        add(of_block(blocks, w, k), total);
      }
      make_mean<T>(blocks, w, width, total);
    }
  }

 private:
  void clear() const {
    for (int64_t w = 0; w < pooling.W(); ++w) std::fill_n(pooled + w * D, width, Accumulator<T>(0));
  }

  void add(const Accumulator<T>* sums, Accumulator<T>* total) const {
    for (int64_t i = 0; i < width; ++i) total[i] += sums[i];
  }
};

// The adjoint: writes those columns of every token.
template <class T>
void unpool_block(const Tokens<T>& tokens, Pooling pooling, int64_t D, int64_t width,
                  const Accumulator<T>* grad_pooled) {
  const int64_t W = pooling.W(), n = tokens.prompt_tokens();
  Accumulator<T> sums[kMaxBlock];
  const T* first_of_range = nullptr;
  TokenRange range{0, 0};
  int64_t w = 0, rank = -1;
  for (int64_t t = 0; t < tokens.count; ++t) {
    T* to = tokens.data + t * tokens.stride;
    const bool is_prompt = tokens.is_prompt(t);
    if (is_prompt) ++rank;
    const bool begins = is_prompt && w < W && pooled_range(pooling, w, n).begin == rank;
    if (begins) {
      std::fill_n(sums, width, Accumulator<T>(0));
      for (; w < W && pooled_range(pooling, w, n).begin == rank; ++w) {
        range = pooled_range(pooling, w, n);
        const auto length = static_cast<Accumulator<T>>(range.end - range.begin);
        const Accumulator<T>* grad = grad_pooled + w * D;
        for (int64_t i = 0; i < width; ++i) sums[i] += grad[i] / length;
      }
      for (int64_t i = 0; i < width; ++i) narrow(sums[i], to + i);
      first_of_range = to;
    } else if (is_prompt && rank < range.end) {
      std::memcpy(to, first_of_range, width * sizeof(T));
    } else {
      std::memset(to, 0, width * sizeof(T));
    }
  }
}

// Hands the threads pieces of B sequences of D columns, `bytes` in all: body(element, sequence,
// first column, columns), where `element` only tells the type of the hidden states.
template <class Body>
void for_each_block(DType dtype, int64_t B, int64_t D, int64_t max_width, int64_t bytes,
                    int threads, const Body& body) {
  const int team = threads_for(bytes, threads);
  const ColumnBlocks blocks(B, D, max_width, team);
  with_element_type(dtype, [&](auto element) {
    parallel_for(B * blocks.count, team, [&](int64_t item) {
      const int64_t b = item / blocks.count, block = item % blocks.count;
      body(element, b, blocks.begin(block), blocks.size(block));
    });
  });
}

// How the threads share the pooling of B sequences of T tokens at most.
struct PoolPlan {
  int64_t B, D, W, later;  // blocks of a sequence that are not the first of their window
  int team;
  int64_t pieces;  // runs of blocks that a sequence is cut in: one where sequences are enough

  PoolPlan(int64_t B, int64_t T, int64_t D, int64_t bytes, Pooling pooling, int threads)
      : B(B), D(D), W(pooling.W()), team(threads_for(bytes, threads)) {
    const int64_t K = RankBlocks::per_window(pooling, T);
    later = W * (K - 1);
    pieces = 1;
    if (B == 0 || B >= team) return;
    const int64_t wanted = std::clamp<int64_t>(bytes / kPieceBytes, team, kPiecesPerThread * team);
    pieces = std::min(W * K, ceil_div(wanted, B));
  }

  int64_t scratch_elements() const { return pieces == 1 ? 0 : B * later * D; }
};

// Sequences in the order in which threads take them: the longest first, so that none begins a long
// one when the others are about to end. Of many sequences any order will do.
class SequenceOrder {
 public:
  static SequenceOrder as_given() { return SequenceOrder(0); }
  static SequenceOrder longest_first(const PackedStates& hidden) {
    SequenceOrder order(hidden.B <= kMost ? hidden.B : 0);
    const auto begin = order.sequences_.begin(), end = begin + order.count_;
    std::iota(begin, end, 0);
    std::sort(begin, end,
              [&](int64_t a, int64_t b) { return hidden.length(a) > hidden.length(b); });
    return order;
  }

  int64_t operator[](int64_t i) const { return i < count_ ? sequences_[i] : i; }

 private:
  static constexpr int64_t kMost = 64;
  explicit SequenceOrder(int64_t count) : count_(count) {}

  int64_t count_;
  std::array<int64_t, kMost> sequences_;
};

// tokens_of(element, b) are the tokens of sequence b. scratch [B, W, K - 1, D] of the plan's K.
template <class TokensOf>
void pool_sequences(const Kernels& kernels, DType dtype, const PoolPlan& plan, Pooling pooling,
                    const SequenceOrder& order, const TokensOf& tokens_of, void* scratch,
                    void* pooled) {
  // body(columns, tokens, i) for i < parts of every sequence.
  const auto for_each = [&](auto element, int64_t parts, int64_t max_width, int team,
                            const auto& body) {
    using T = decltype(element);
    using Sum = Accumulator<T>;
    const ColumnBlocks blocks(plan.B * parts, plan.D, max_width, team);
    auto* later = static_cast<Sum*>(scratch);  // null where one thread takes a sequence
    parallel_for(plan.B * parts * blocks.count, team, [&](int64_t item) {
      const int64_t block = item % blocks.count, part = item / blocks.count % parts;
      const int64_t b = order[item / blocks.count / parts], column = blocks.begin(block);
      Tokens<const T> tokens = tokens_of(element, b);
      tokens.data += column;
      const PooledColumns<T> columns{kernels.add_rows[static_cast<int>(dtype)],
                                     pooling,
                                     plan.D,
                                     blocks.size(block),
                                     static_cast<Sum*>(pooled) + b * plan.W * plan.D + column,
                                     later ? later + b * plan.later * plan.D + column : nullptr};
      body(columns, tokens, part);
    });
  };
  const int64_t max_width = plan.D <= kMaxRow ? kMaxRow : kMaxBlock, pieces = plan.pieces;
  with_element_type(dtype, [&](auto element) {
    if (pieces == 1) {
      return for_each(
          element, 1, max_width, plan.team,
          [](const auto& columns, const auto& tokens, int64_t) { columns.pool(tokens); });
    }
    for_each(element, pieces, max_width, plan.team,
             [&](const auto& columns, const auto& tokens, int64_t piece) {
               columns.sum_piece(tokens, piece, pieces);
             });
    const int team = threads_for(plan.scratch_elements() * sizeof(float), plan.team);
    for_each(element, 1, kMaxBlock, team,
             [](const auto& columns, const auto& tokens, int64_t) { columns.add_blocks(tokens); });
  });
}

template <class TokensOf>
void unpool_sequences(DType dtype, int64_t B, int64_t D, int64_t bytes, Pooling pooling,
                      int threads, const TokensOf& tokens_of, const void* grad_pooled) {
  const int64_t F = pooling.W() * D;
  for_each_block(dtype, B, D, kMaxBlock, bytes, threads,
                 [&](auto element, int64_t b, int64_t column, int64_t width) {
                   using T = decltype(element);
                   Tokens<T> tokens = tokens_of(element, b);
                   tokens.data += column;
                   unpool_block<T>(
                       tokens, pooling, D, width,
                       static_cast<const Accumulator<T>*>(grad_pooled) + b * F + column);
                 });
}

float dot(const Kernels& kernels, const float* a, const float* b, int64_t n) {
  return kernels.dot_f32(a, b, n);
}

double dot(const Kernels& kernels, const double* a, const double* b, int64_t n) {
  return kernels.dot_f64(a, b, n);
}

template <class T>
T silu(T x) {
  return x / (1 + std::exp(-x));
}

}  // namespace

int64_t HiddenStates::bytes() const { return B * T * D * size_of(dtype); }

int64_t PackedStates::bytes() const { return N * D * size_of(dtype); }

namespace {

PoolPlan plan_of(const HiddenStates& hidden, Pooling pooling, int threads) {
  return {hidden.B, hidden.T, hidden.D, hidden.bytes(), pooling, threads};
}

PoolPlan plan_of(const PackedStates& hidden, Pooling pooling, int threads) {
  int64_t longest = 0;
  for (int64_t b = 0; b < hidden.B; ++b) longest = std::max(longest, hidden.length(b));
  return {hidden.B, longest, hidden.D, hidden.bytes(), pooling, threads};
}

}  // namespace

int64_t scratch_elements(const HiddenStates& hidden, Pooling pooling, int threads) {
  return plan_of(hidden, pooling, threads).scratch_elements();
}

void router_pool(const Kernels& kernels, const HiddenStates& hidden, const bool* prompt_mask,
                 Pooling pooling, int threads, void* scratch, void* pooled) {
  const auto tokens_of = [&](auto element, int64_t b) {
    using T = decltype(element);
    const T* first = static_cast<const T*>(hidden.data) + b * hidden.stride_B;
    return Tokens<const T>{first, hidden.stride_T, hidden.T, prompt_mask + b * hidden.T};
  };
  pool_sequences(kernels, hidden.dtype, plan_of(hidden, pooling, threads), pooling,
                 SequenceOrder::as_given(), tokens_of, scratch, pooled);
}

void router_pool_backward(const HiddenStates& hidden, const bool* prompt_mask, Pooling pooling,
                          const void* grad_pooled, int threads, void* grad_hidden) {
  const auto tokens_of = [&](auto element, int64_t b) {
    using T = decltype(element);
    T* first = static_cast<T*>(grad_hidden) + b * hidden.T * hidden.D;
    return Tokens<T>{first, hidden.D, hidden.T, prompt_mask + b * hidden.T};
  };
  unpool_sequences(hidden.dtype, hidden.B, hidden.D, hidden.bytes(), pooling, threads, tokens_of,
                   grad_pooled);
}

int64_t scratch_elements(const PackedStates& hidden, Pooling pooling, int threads) {
  return plan_of(hidden, pooling, threads).scratch_elements();
}

void router_pool_packed(const Kernels& kernels, const PackedStates& hidden, Pooling pooling,
                        int threads, void* scratch, void* pooled) {
  const auto tokens_of = [&](auto element, int64_t b) {
    using T = decltype(element);
    const T* first = static_cast<const T*>(hidden.data) + hidden.offsets[b] * hidden.stride_N;
    return Tokens<const T>{first, hidden.stride_N, hidden.length(b), nullptr};
  };
  pool_sequences(kernels, hidden.dtype, plan_of(hidden, pooling, threads), pooling,
                 SequenceOrder::longest_first(hidden), tokens_of, scratch, pooled);
}

void router_pool_packed_backward(const PackedStates& hidden, Pooling pooling,
                                 const void* grad_pooled, int threads, void* grad_hidden) {
  const auto tokens_of = [&](auto element, int64_t b) {
    using T = decltype(element);
    T* first = static_cast<T*>(grad_hidden) + hidden.offsets[b] * hidden.D;
    return Tokens<T>{first, hidden.D, hidden.length(b), nullptr};
  };
  unpool_sequences(hidden.dtype, hidden.B, hidden.D, hidden.bytes(), pooling, threads, tokens_of,
                   grad_pooled);
}

template <class T>
void router_head(const Kernels& kernels, const RouterHead<T>& head, const T* pooled, int64_t B,
                 int threads, T* units, T* logit) {
  const int64_t F = head.F, H = head.H;
  const bool is_linear = head.out_weight == nullptr;
  if (is_linear) units = logit;

  // A block of units is taken through the whole batch: its weights are read from memory once.
  constexpr int64_t kUnitsPerBlock = 16;
  const int64_t blocks = ceil_div(H, kUnitsPerBlock);
  const int team = threads_for(H * F * static_cast<int64_t>(sizeof(T)), threads);
  parallel_for(blocks, team, [&](int64_t block) {
    for (int64_t b = 0; b < B; ++b) {
      const T* x = pooled + b * F;
      T scale = 1;
      if (head.norm_eps > 0) {
        scale = 1 / std::sqrt(dot(kernels, x, x, F) / F + static_cast<T>(head.norm_eps));
      }
      const int64_t end = std::min(H, (block + 1) * kUnitsPerBlock);
      for (int64_t h = block * kUnitsPerBlock; h < end; ++h) {
        units[b * H + h] = scale * dot(kernels, x, head.weight + h * F, F) + head.bias[h];
      }
    }
  });
  if (is_linear) return;

  for (int64_t b = 0; b < B; ++b) {
    T sum = 0;
    for (int64_t h = 0; h < H; ++h) sum += silu(units[b * H + h]) * head.out_weight[h];
    logit[b] = sum + head.out_bias[0];
  }
}

template void router_head(const Kernels&, const RouterHead<float>&, const float*, int64_t, int,
                          float*, float*);
template void router_head(const Kernels&, const RouterHead<double>&, const double*, int64_t, int,
                          double*, double*);

}  // namespace firstlm
