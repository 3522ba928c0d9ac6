// A decoder of the family RMSNorm, rotary positions, grouped-query attention, gated MLP, as its
// config describes it: llama, mistral, qwen2, qwen3, smollm3. One forward serves prefill and
// decode: it takes segments, consecutive new tokens of one sequence each, and every layer runs the
// segments whose skip plan keeps it. Letters: L layers, D hidden size, Hq query heads, H key/value
// heads, I intermediate size, V vocabulary, T tokens of a segment, N tokens of all segments.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "elementwise.h"
#include "linear.h"
#include "low_rank.h"
#include "router.h"
#include "team.h"

namespace firstlm {

struct DecoderConfig {
  int64_t L, D, I, Hq, H, head_dim, V;  // I is a multiple of kPanelRows (padded with zeros)
  double norm_eps;
  double attention_scale;
  std::vector<float> inverse_frequencies;       // of the rotary embedding, [rotated / 2]
  double rope_scaling;                          // of its cos and sin
  std::vector<uint8_t> rotates;                 // [L]: layers with rotary positions
  std::vector<std::optional<int64_t>> windows;  // [L]: tokens that a query sees, itself included
  DType cache_dtype;                            // of keys and values: f32 or bf16
  int64_t chunk_tokens = 512;                   // that a layer takes at once, see forward
};

// y = W x + B (A x) + bias.
struct Linear {
  PackedMatrix weight;
  const float* bias = nullptr;  // f32, null: none
  LowRank low_rank{};           // an adapter that is not merged

  int64_t bytes() const { return weight.bytes() + low_rank.bytes(); }  // what one product reads
};

// Norms are f32; null pointers: the model has none.
struct LayerWeights {
  const float* attention_norm;         // [D]
  Linear qkv;                          // [(Hq + 2 H) head_dim, D]
  const float *query_norm, *key_norm;  // [head_dim]
  Linear output;                       // [D, Hq head_dim]
  const float* mlp_norm;               // [D]
  Linear gate_up;                      // [2 I, D]: blocks of 16 rows, of gate and up in turn
  Linear down;                         // [D, I]
};

struct DecoderWeights {
  PackedMatrix embedding;  // [V, D]
  Linear head;             // [V, D]; the embedding itself where they are tied
  const float* final_norm;
  std::vector<LayerWeights> layers;
};

// The cache of one sequence, as one layer sees it: [H, C, head_dim], slots head_dim apart.
struct LayerCache {
  void *keys, *values;
  int64_t stride_H;      // elements
  int64_t next_slot;     // of the first new token
  int64_t visible_slot;  // the first that it sees
};

class SequenceCache {
 public:
  virtual ~SequenceCache() = default;
  // Room for T more tokens in a layer that the sequence keeps. Takes no Python lock.
  virtual LayerCache reserve(int64_t layer, int64_t T) = 0;
  // T tokens have been written.
  virtual void append(int64_t layer, int64_t T) = 0;
};

// The router of one layer; see router.h.
struct LayerRouter {
  Pooling pooling;
  RouterHead<float> head;
};

// How a segment that is a whole prompt finds its plan.
struct Routing {
  const LayerRouter* routers;  // [L]
  const float* thresholds;     // [L]: kept iff keep_prob >= threshold
  bool skips;                  // whether a dropped layer is skipped for the prompt too
};

struct Segment {
  const int64_t* tokens;  // [T], each in [0, V)
  int64_t T;
  int64_t position;        // of the first token
  SequenceCache* cache;    //
  uint8_t* keep;           // [L]: the plan; written if routed
  const Routing* routing;  // null: the plan is given
  float* keep_prob;        // [L]: written if routed
  int64_t num_logits;      // logits are wanted of so many last tokens
};

// What forward has read and run, summed over its calls.
struct DecoderCounters {
  int64_t forwards = 0;
  int64_t weight_bytes = 0;         // of layers that any segment ran, and the head
  int64_t cache_bytes = 0;          // of keys and values that were attended to
  std::vector<int64_t> layer_runs;  // [L]: times that any segment ran the layer
  int64_t segment_runs = 0;         // (segment, layer) pairs
  int64_t router_nanoseconds = 0;
};

class Decoder {
 public:
  // Throws std::invalid_argument if a shape does not fit the config.
  Decoder(DecoderConfig config, DecoderWeights weights, const Kernels& kernels);
  ~Decoder();

  const DecoderConfig& config() const;

  // Runs the segments, writes their keys and values to their caches and the wanted logits to
  // `logits`, [sum of num_logits, V] in the order of the segments. A segment's results depend
  // neither on the other segments nor on the size of the team. One call at a time.
  //
  // Every layer takes the tokens in chunks: only what enters it lies in memory for all of them.
  // Between two chunks the calling thread calls `interrupt`, if given; when that throws, forward
  // does, and the caches hold what they held.
  void forward(Team& team, std::vector<Segment>& segments, float* logits,
               const std::function<void()>& interrupt = nullptr);

  const DecoderCounters& counters() const;

 private:
  struct Pass;
  struct Buffers;
  DecoderConfig config_;
  DecoderWeights weights_;
  const Kernels& kernels_;
  Rope rope_;
  std::unique_ptr<Buffers> buffers_;
  DecoderCounters counters_;
};

}  // namespace firstlm
