// One forward of a decoder: what its threads share, and what each has for itself. Inside `run`
// every thread calls the same functions in the same order; a function that ends with a barrier says
// so.
#pragma once

#include <vector>

#include "attention.h"
#include "buffer.h"
#include "decoder.h"

namespace firstlm {

// The segments of a chunk that one layer runs, and their tokens side by side, A in all.
struct ActiveTokens {
  std::vector<int64_t> segments;  // indices
  std::vector<int64_t> first;     // [segments]: the first token of each, among the A
  std::vector<int64_t> rows;      // [A]: where the token's hidden states are, among the N

  int64_t A() const { return static_cast<int64_t>(rows.size()); }
};

// Of one thread, kept between forwards.
struct ThreadScratch {
  ActiveTokens active;
  Buffer<float> normed;         // [few tokens, D]
  Buffer<std::byte> input;      // of a product of few tokens
  Buffer<std::byte> A_input;    // of an adapter's A
  Buffer<float> heads;          // [G + 1, padded head_dim]: rotated queries and key of one group
  Buffer<float> pooled;         // [W, a share of D]
  Buffer<std::byte> attention;  // of prefill_attention
};

// C is the tokens of the largest chunk.
struct Decoder::Buffers {
  Buffer<float> hidden;            // [N, D]
  Buffer<float> cosines, sines;    // [N, rotated / 2]
  Buffer<float> normed;            // [C, D]
  Buffer<std::byte> input;         // of a product of many tokens
  Buffer<float> projected;         // [C, widest output]
  Buffer<float> inner;             // [C, the same]: what o_proj and down_proj read
  Buffer<float> low_rank;          // [C, R]: A x of an adapter
  Buffer<float> maxima, totals;    // [C, Hq, splits]
  Buffer<float> sums;              // [C, Hq, splits, padded head_dim]
  Buffer<float> pooled;            // [segments, W * D]
  Buffer<float> units;             // [H of the router's head]
  std::vector<Segment> segments;   // those that were given, cut so that each fits in a chunk
  std::vector<int64_t> chunks;     // [chunks + 1]: the segments of each, consecutive ones
  std::vector<int64_t> pieces;     // [given + 1]: the segments that each given one is cut into
  std::vector<int64_t> first;      // [segments + 1]: where a segment's tokens begin, among the N
  std::vector<LayerCache> caches;  // [L, segments]
  std::vector<ThreadScratch> threads;
};

struct Decoder::Pass {
  Decoder& decoder;
  Team& team;
  std::vector<Segment>& given;
  float* logits;
  const std::function<void()>& interrupt;
  const DecoderConfig& config;
  const Kernels& kernels;
  Buffers& shared;
  std::vector<Segment>& segments;  // of `shared`
  int64_t N;                       // tokens of all segments
  bool routes;                     // whether any segment is routed
  int64_t width;                   // elements between tokens of `projected` and of `inner`
  int64_t splits;                  // at most, of the slots that a segment of a single token sees

  Pass(Decoder& decoder, Team& team, std::vector<Segment>& given, float* logits,
       const std::function<void()>& interrupt);

  int64_t S() const { return static_cast<int64_t>(segments.size()); }
  int64_t G() const { return static_cast<int64_t>(given.size()); }
  int64_t num_chunks() const { return static_cast<int64_t>(shared.chunks.size()) - 1; }
  int64_t group() const { return config.Hq / config.H; }
  int64_t first_of(int64_t segment) const { return shared.first[segment]; }
  LayerCache& cache(int64_t layer, int64_t segment) { return shared.caches[layer * S() + segment]; }
  bool runs(const Segment& s, int64_t layer) const {
    return (s.routing && !s.routing->skips) || s.keep[layer];
  }

  void run();

  // --- decoder.cpp ---
  void cut();                     // given segments -> segments and chunks
  int64_t largest_chunk() const;  // tokens
  void run_share(Share share);
  void embed(Share share);  // ends with a barrier
  void find_active(int64_t layer, int64_t chunk, ActiveTokens& active) const;
  void run_attention(Share share, int64_t layer);  // ends with a barrier
  void run_mlp(Share share, int64_t layer);        // ends with a barrier
  void write_logits(Share share);
  void count(int64_t layer, bool first_chunk);

  // What the weights of a linear read, of the A tokens of x [A, K]; its adapter's A x is written
  // beside. May end with a barrier.
  const std::byte* prepare(Share share, const Linear& linear, const float* x, int64_t stride,
                           int64_t A);
  // The same of the RMSNorm of hidden states `rows` [A].
  const std::byte* prepare_normed(Share share, const Linear& linear, const float* norm,
                                  const int64_t* rows, int64_t A);
  // A x of some of the tokens, some of its panels.
  void multiply_A(Share share, const LowRank& low_rank, const float* x, int64_t stride,
                  Share::Range tokens, Share::Range panels);
  // y [A, N], panels [first, last), of what was prepared.
  void multiply(const Linear& linear, const std::byte* input, int64_t A, int64_t first,
                int64_t last, float* y, int64_t stride);
  // hidden[rows] += the linear's outputs, this thread's.
  void add_product(Share share, const Linear& linear, const std::byte* input,
                   const ActiveTokens& active);

  // --- decoder_routing.cpp ---
  void reserve_caches(int64_t layer);
  void route(Share share, int64_t layer);  // ends with a barrier

  // --- decoder_attention.cpp ---
  void attend(Share share, int64_t layer);  // projected -> inner, without a barrier at the end
  void store_prompts(Share share, int64_t layer);
  void attend_prompts(Share share, int64_t layer);
  void attend_single_tokens(Share share, int64_t layer);
  void attend_group(Share share, int64_t layer, int64_t segment, int64_t token, int64_t kv_head,
                    int64_t first, int64_t last);
  void merge_head(int64_t token, int64_t head, int64_t count);
  void rotate_head(int64_t layer, int64_t row, const float* from, const float* norm,
                   float* to) const;
  void rotate_queries(int64_t layer, int64_t token, int64_t row, int64_t kv_head, float* to) const;
  void store_token(int64_t layer, const LayerCache& cache, int64_t token, int64_t row,
                   int64_t kv_head, int64_t slot, float* scratch) const;
};

}  // namespace firstlm
