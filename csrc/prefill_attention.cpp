#include "prefill_attention.h"

#include <algorithm>

#include "arithmetic.h"

namespace firstlm {
namespace {

// Rows of a block times padded head_dim, in floats: queries and sums stay in L2 together.
constexpr int64_t kElementsPerBlock = 16 * 1024;

int64_t tokens_per_block(const PrefillAttention& attention) {
  const int64_t rows = kElementsPerBlock / padded_head_dim(attention.D);
  return std::clamp<int64_t>(rows * attention.H / attention.Hq, 1, attention.T);
}

// What tokens cost, in slots that are seen: later tokens see more.
class Costs {
 public:
  explicit Costs(const PrefillAttention& attention)
      : T_(attention.T),
        first_(attention.first_slot - attention.begin + 1),
        window_(attention.window > 0 ? attention.window : first_ + T_) {}

  // Of tokens [0, t) of one head.
  int64_t of_tokens(int64_t t) const {
    const int64_t growing = std::clamp<int64_t>(window_ - first_, 0, t);
    return growing * first_ + growing * (growing - 1) / 2 + (t - growing) * most(t) + t * kOfToken;
  }

  // Where the part of `rank` begins in the tokens of all heads, one head after the other.
  int64_t first_token(int64_t H, int64_t rank, int64_t size) const {
    const int64_t of_head = of_tokens(T_), cost = H * of_head * rank / size;
    const int64_t h = cost / of_head, rest = cost % of_head;
    int64_t low = 0, high = T_;  // of_tokens(low) <= rest < of_tokens(high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (of_tokens(middle) <= rest ? low : high) = middle;
    }
    return h * T_ + low;
  }

 private:
  static constexpr int64_t kOfToken = 16;  // to pack its queries and to write its output

  int64_t most(int64_t t) const { return std::min(window_, first_ + t); }

  int64_t T_, first_, window_;
};

void attend(const Kernels& kernels, const PrefillAttention& attention, int64_t h, int64_t t,
            int64_t tokens, std::byte* scratch, float* output) {
  const int64_t D = attention.D, G = attention.Hq / attention.H;
  const int64_t first = attention.first_slot - attention.begin + t;
  const int64_t all = first + tokens;
  const int64_t bytes = size_of(attention.dtype);
  const int64_t begin = (h * attention.stride_H + attention.begin * D) * bytes;
  const int64_t query = t * attention.stride_T + h * G * D;
  kernels.attend_tokens[static_cast<int>(attention.dtype)]({
      .tokens = tokens,
      .G = G,
      .D = D,
      .query = attention.query + query,
      .stride_T = attention.stride_T,
      .keys = static_cast<const std::byte*>(attention.keys) + begin,
      .values = static_cast<const std::byte*>(attention.values) + begin,
      .first = first,
      .window = attention.window > 0 ? std::min(attention.window, all) : all,
      .scale = static_cast<float>(attention.scale),
      .scratch = reinterpret_cast<float*>(scratch),
      .output = output + query,
  });
}

}  // namespace

int64_t prefill_attention_scratch(const PrefillAttention& attention) {
  const int64_t rows = tokens_per_block(attention) * attention.Hq / attention.H;
  return prefill_scratch_floats(rows, attention.D) * int64_t(sizeof(float));
}

void prefill_attention(const Kernels& kernels, const PrefillAttention& attention, Share share,
                       std::byte* scratch, float* output) {
  const int64_t T = attention.T, H = attention.H;
  if (T == 0) return;
  const Costs costs(attention);
  const int64_t last = costs.first_token(H, share.rank + 1, share.size);
  int64_t token = costs.first_token(H, share.rank, share.size);
  while (token < last) {
    const int64_t t = token % T, left = std::min(T - t, last - token);
    // Blocks of about the same size rather than a small one in the end.
    const int64_t tokens = ceil_div(left, ceil_div(left, tokens_per_block(attention)));
    attend(kernels, attention, token / T, t, tokens, scratch, output);
    token += tokens;
  }
}

}  // namespace firstlm
