#include "router.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "arithmetic.h"
#include "parallel.h"

namespace firstlm {
namespace {

// Sums of one block stay in L1 beside the rows that stream through it.
constexpr int64_t kMaxBlock = 1024;
// Where whole rows are read one after the other, a block may be as wide as this.
constexpr int64_t kMaxRow = 4096;

// A row is split in blocks of columns where there are fewer rows than threads, and no further: the
// wider a block, the longer the pieces of memory that are read in order. Blocks never split tokens:
// sums do not depend on the number of threads.
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

// Walks over the prompt tokens of one sequence.
template <class T>
struct PromptCursor {
  const Tokens<T>& tokens;
  int64_t position;  // in the sequence
  int64_t rank = 0;  // among prompt tokens

  explicit PromptCursor(const Tokens<T>& tokens) : tokens(tokens), position(0) { skip_others(); }

  void advance() {
    ++position;
    ++rank;
    skip_others();
  }

  const T* states() const { return tokens.data + position * tokens.stride; }

 private:
  // Called only while a prompt token is left.
  void skip_others() {
    while (!tokens.is_prompt(position)) ++position;
  }
};

// How rows are read: `at_once` of them, while what lies `ahead` bytes further is fetched.
struct Reading {
  int at_once;
  int64_t ahead;

  // Whole rows in the order of memory are read fastest one by one, as one stream; pieces of rows
  // several at once.
  template <class T>
  static Reading of(const Tokens<const T>& tokens, int64_t width) {
    constexpr int64_t kStreamAhead = 8192;  // bytes: what memory delivers within its latency
    if (width == tokens.stride) return {1, kStreamAhead};
    return {kRowsPerPass, kRowsPerPass * tokens.stride * static_cast<int64_t>(sizeof(T))};
  }
};

// Some columns of all windows of one sequence: pooled [W, D] from its first column on.
template <class T>
void pool_block(AddRows add_rows, const Tokens<const T>& tokens, Pooling pooling, int64_t D,
                int64_t width, Accumulator<T>* pooled) {
  const int64_t W = pooling.W();
  for (int64_t w = 0; w < W; ++w) std::fill_n(pooled + w * D, width, Accumulator<T>(0));
  const int64_t n = tokens.prompt_tokens();
  if (n == 0) return;

  const Reading reading = Reading::of(tokens, width);
  PromptCursor<const T> token(tokens);
  for (int64_t w = 0; w < W; ++w) {
    const TokenRange range = pooled_range(pooling, w, n);
    Accumulator<T>* sums = pooled + w * D;
    const void* rows[kRowsPerPass];
    int pending = 0;
    while (token.rank < range.begin) token.advance();
    while (true) {
      rows[pending++] = token.states();
      const bool is_last = token.rank + 1 == range.end;
      if (pending == reading.at_once || is_last) {
        add_rows(rows, pending, width, reading.ahead, sums);
        pending = 0;
      }
      if (is_last) break;  // stay on it: the next window may begin with the same token
      token.advance();
    }
    const auto length = static_cast<Accumulator<T>>(range.end - range.begin);
    for (int64_t i = 0; i < width; ++i) sums[i] /= length;
  }
}

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

// tokens_of(element, b) are the tokens of sequence b; B of them.
template <class TokensOf>
void pool_sequences(const Kernels& kernels, DType dtype, int64_t B, int64_t D, int64_t bytes,
                    Pooling pooling, int threads, const TokensOf& tokens_of, void* pooled) {
  const int64_t F = pooling.W() * D;
  const int64_t max_width = D <= kMaxRow ? kMaxRow : kMaxBlock;
  for_each_block(dtype, B, D, max_width, bytes, threads,
                 [&](auto element, int64_t b, int64_t column, int64_t width) {
                   using T = decltype(element);
                   Tokens<const T> tokens = tokens_of(element, b);
                   tokens.data += column;
                   pool_block<T>(kernels.add_rows[static_cast<int>(dtype)], tokens, pooling, D,
                                 width, static_cast<Accumulator<T>*>(pooled) + b * F + column);
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

void router_pool(const Kernels& kernels, const HiddenStates& hidden, const bool* prompt_mask,
                 Pooling pooling, int threads, void* pooled) {
  const auto tokens_of = [&](auto element, int64_t b) {
    using T = decltype(element);
    const T* first = static_cast<const T*>(hidden.data) + b * hidden.stride_B;
    return Tokens<const T>{first, hidden.stride_T, hidden.T, prompt_mask + b * hidden.T};
  };
  pool_sequences(kernels, hidden.dtype, hidden.B, hidden.D, hidden.bytes(), pooling, threads,
                 tokens_of, pooled);
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

void router_pool_packed(const Kernels& kernels, const PackedStates& hidden, Pooling pooling,
                        int threads, void* pooled) {
  const auto tokens_of = [&](auto element, int64_t b) {
    using T = decltype(element);
    const T* first = static_cast<const T*>(hidden.data) + hidden.offsets[b] * hidden.stride_N;
    return Tokens<const T>{first, hidden.stride_N, hidden.length(b), nullptr};
  };
  pool_sequences(kernels, hidden.dtype, hidden.B, hidden.D, hidden.bytes(), pooling, threads,
                 tokens_of, pooled);
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
