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

// A row is split in blocks of columns where there are fewer rows than threads, and no further: the
// wider a block, the longer the pieces of memory that are read in order. Blocks never split tokens:
// sums do not depend on the number of threads.
struct ColumnBlocks {
  int64_t D, width, count;

  ColumnBlocks(int64_t B, int64_t D, int threads) : D(D) {
    constexpr int64_t kMultiple = 32;
    const int64_t blocks_per_row = ceil_div(threads, std::max<int64_t>(B, 1));
    width = std::min(ceil_div(D, blocks_per_row), kMaxBlock);
    width = std::max<int64_t>(ceil_div(width, kMultiple), 1) * kMultiple;
    count = ceil_div(D, width);
  }

  int64_t begin(int64_t block) const { return block * width; }
  int64_t size(int64_t block) const { return std::min(width, D - block * width); }
};

int64_t count_prompt_tokens(const bool* mask, int64_t T) {
  return std::count(mask, mask + T, true);
}

// Walks over the prompt tokens of one row.
struct PromptCursor {
  const bool* mask;
  int64_t position;  // in the row
  int64_t rank = 0;  // among prompt tokens

  explicit PromptCursor(const bool* mask) : mask(mask), position(0) { skip_others(); }

  void advance() {
    ++position;
    ++rank;
    skip_others();
  }

 private:
  // Called only while a prompt token is left.
  void skip_others() {
    while (!mask[position]) ++position;
  }
};

template <class T>
void pool_block(const Kernels& kernels, const HiddenStates& hidden, const bool* mask, int64_t b,
                Pooling pooling, int64_t column, int64_t width, Accumulator<T>* pooled) {
  const int64_t W = pooling.W(), D = hidden.D;
  for (int64_t w = 0; w < W; ++w) {
    std::fill_n(pooled + w * D + column, width, Accumulator<T>(0));
  }
  const int64_t n = count_prompt_tokens(mask, hidden.T);
  if (n == 0) return;

  const auto add_rows = kernels.add_rows[static_cast<int>(hidden.dtype)];
  const T* row_0 = static_cast<const T*>(hidden.data) + b * hidden.stride_B + column;
  const int64_t ahead = kRowsPerPass * hidden.stride_T * static_cast<int64_t>(sizeof(T));
  PromptCursor token(mask);
  for (int64_t w = 0; w < W; ++w) {
    const TokenRange range = pooled_range(pooling, w, n);
    Accumulator<T>* sums = pooled + w * D + column;
    const void* rows[kRowsPerPass];
    int pending = 0;
    while (token.rank < range.begin) token.advance();
    while (true) {
      rows[pending++] = row_0 + token.position * hidden.stride_T;
      const bool is_last = token.rank + 1 == range.end;
      if (pending == kRowsPerPass || is_last) {
        add_rows(rows, pending, width, ahead, sums);
        pending = 0;
      }
      if (is_last) break;  // stay on it: the next window may begin with the same token
      token.advance();
    }
    const auto length = static_cast<Accumulator<T>>(range.end - range.begin);
    for (int64_t i = 0; i < width; ++i) sums[i] /= length;
  }
}

template <class T>
void unpool_block(const HiddenStates& hidden, const bool* mask, Pooling pooling, int64_t column,
                  int64_t width, const Accumulator<T>* grad_pooled, T* grad_row) {
  const int64_t W = pooling.W(), D = hidden.D;
  const int64_t n = count_prompt_tokens(mask, hidden.T);
  Accumulator<T> sums[kMaxBlock];
  const T* first_of_range = nullptr;
  TokenRange range{0, 0};
  int64_t w = 0, rank = -1;
  for (int64_t t = 0; t < hidden.T; ++t) {
    T* to = grad_row + t * D + column;
    if (mask[t]) ++rank;
    const bool begins = mask[t] && w < W && pooled_range(pooling, w, n).begin == rank;
    if (begins) {
      std::fill_n(sums, width, Accumulator<T>(0));
      for (; w < W && pooled_range(pooling, w, n).begin == rank; ++w) {
        range = pooled_range(pooling, w, n);
        const auto length = static_cast<Accumulator<T>>(range.end - range.begin);
        const Accumulator<T>* grad = grad_pooled + w * D + column;
        for (int64_t i = 0; i < width; ++i) sums[i] += grad[i] / length;
      }
      for (int64_t i = 0; i < width; ++i) narrow(sums[i], to + i);
      first_of_range = to;
    } else if (mask[t] && rank < range.end) {
      std::memcpy(to, first_of_range, width * sizeof(T));
    } else {
      std::memset(to, 0, width * sizeof(T));
    }
  }
}

// Hands the threads pieces of [B, D]: body(element, row, first column, columns), where `element`
// only tells the type of the hidden states.
template <class Body>
void for_each_block(const HiddenStates& hidden, int threads, const Body& body) {
  const int team = threads_for(hidden.bytes(), threads);
  const ColumnBlocks blocks(hidden.B, hidden.D, team);
  with_element_type(hidden.dtype, [&](auto element) {
    parallel_for(hidden.B * blocks.count, team, [&](int64_t item) {
      const int64_t b = item / blocks.count, block = item % blocks.count;
      body(element, b, blocks.begin(block), blocks.size(block));
    });
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

void router_pool(const Kernels& kernels, const HiddenStates& hidden, const bool* prompt_mask,
                 Pooling pooling, int threads, void* pooled) {
  const int64_t F = pooling.W() * hidden.D;
  for_each_block(hidden, threads, [&](auto element, int64_t b, int64_t column, int64_t width) {
    using T = decltype(element);
    pool_block<T>(kernels, hidden, prompt_mask + b * hidden.T, b, pooling, column, width,
                  static_cast<Accumulator<T>*>(pooled) + b * F);
  });
}

void router_pool_backward(const HiddenStates& hidden, const bool* prompt_mask, Pooling pooling,
                          const void* grad_pooled, int threads, void* grad_hidden) {
  const int64_t F = pooling.W() * hidden.D;
  for_each_block(hidden, threads, [&](auto element, int64_t b, int64_t column, int64_t width) {
    using T = decltype(element);
    unpool_block<T>(hidden, prompt_mask + b * hidden.T, pooling, column, width,
                    static_cast<const Accumulator<T>*>(grad_pooled) + b * F,
                    static_cast<T*>(grad_hidden) + b * hidden.T * hidden.D);
  });
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
