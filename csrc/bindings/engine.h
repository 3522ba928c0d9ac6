// The native engine for torch: a decoder over tensors of packed weights, sequences with their skip
// caches, and the decode loop. None of it needs the GIL.
// Letters: B sequences, L layers, T tokens, V vocabulary.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../decoder.h"
#include "../sampling.h"
#include "skip_cache.h"

namespace firstlm {

// The tokens of one conversation so far: its plan, and keys and values of the layers that it keeps.
class Sequence final : public SequenceCache {
 public:
  // `decoder` tells decoders apart: NativeDecoder::id_.
  Sequence(const DecoderConfig& config, int64_t decoder);
  Sequence(const Sequence& other);

  int64_t decoder() const { return decoder_; }
  int64_t length() const { return length_; }
  bool has_plan() const { return !keep_.empty(); }
  const std::vector<uint8_t>& keep() const { return keep_; }  // [L], empty before the first pass
  MemoryUse memory() const { return storage_.memory(); }
  // At most `length` tokens from now on; RuntimeError if a sliding layer has dropped what is
  // needed.
  void crop(int64_t length);

  // Loses the layers that `keep` [L] drops, with their keys and values. ValueError if it keeps one
  // that was lost before.
  void restrict_to(const std::vector<uint8_t>& keep);

  LayerCache reserve(int64_t layer, int64_t T) override;
  void append(int64_t layer, int64_t T) override { storage_.advance(layer, T); }

  // After a pass of T tokens under `keep`, which the sequence has from then on.
  void passed(int64_t T, const std::vector<uint8_t>& keep);

 private:
  int64_t decoder_, H_, head_dim_;
  at::ScalarType dtype_;
  SkipCacheStorage::Windows windows_;
  SkipCacheStorage storage_;
  std::vector<uint8_t> keep_;
  int64_t length_ = 0;
};

using SequencePtr = std::shared_ptr<Sequence>;

// A pass over new tokens of B sequences.
struct ExtendRequest {
  std::vector<SequencePtr> sequences;
  std::vector<std::vector<int64_t>> tokens;      // [B][T]
  std::optional<at::Tensor> keep;                // bool [B, L]: plans of fresh sequences
  std::optional<std::vector<float>> thresholds;  // [L]: the routers find the plans
  std::vector<int64_t> num_logits;               // [B]: of so many last tokens
};

struct ExtendResult {
  at::Tensor logits;                    // f32 [sum of num_logits, V]
  std::optional<at::Tensor> keep_prob;  // f32 [B, L] if routed
};

class NativeDecoder {
 public:
  using Tensors = std::map<std::string, at::Tensor>;

  NativeDecoder(DecoderConfig config, const std::string& precision,
                const std::string& head_precision, Tensors tensors, int num_threads);

  // Routers of all layers, as RouterHead names their tensors: weight, bias, out_weight, out_bias.
  void set_routers(Pooling pooling, double norm_eps, bool skips, std::vector<Tensors> layers);

  const DecoderConfig& config() const { return decoder_->config(); }
  int num_threads() const { return team_.size(); }
  DecoderCounters counters();

  SequencePtr sequence() const { return std::make_shared<Sequence>(config(), id_); }
  // ValueError for a sequence of another decoder, whose keys and values mean something else.
  void check_own(const Sequence& sequence, size_t index) const;
  // `interrupt`: as in Decoder::forward; when it throws, the sequences are as they were.
  ExtendResult extend(const ExtendRequest& request,
                      const std::function<void()>& interrupt = nullptr);
  // One token for each of some sequences that have a plan -> logits [B, V].
  void step(const std::vector<SequencePtr>& sequences, const std::vector<int64_t>& tokens,
            float* logits);

 private:
  void check(const ExtendRequest& request) const;
  void forward(std::vector<Segment>& segments, float* logits,
               const std::function<void()>& interrupt = nullptr);

  int64_t id_;  // no other decoder of the process has it
  Tensors tensors_;
  std::vector<Tensors> router_tensors_;
  std::vector<LayerRouter> routers_;  // [L], or none
  bool routed_prompts_skip_ = true;
  Team team_;
  std::unique_ptr<Decoder> decoder_;
  std::mutex mutex_;  // of the decoder: one pass at a time
};

// The decode loop of B sequences, each with its own sampler and end.
class Decoding {
 public:
  // `logits` [B, V] are those of the sequences' last tokens, and are overwritten; `seen` [B] are
  // the tokens that the repetition penalty knows already; a row ends after one of `eos`, or after
  // its `max_new_tokens`.
  Decoding(std::shared_ptr<NativeDecoder> decoder, std::vector<SequencePtr> sequences,
           at::Tensor logits, const std::vector<SamplingSettings>& settings,
           const std::vector<std::vector<int64_t>>& seen, std::vector<int64_t> eos,
           std::vector<int64_t> max_new_tokens);

  // Up to `steps` tokens more for every row that has not ended: [B][<= steps]. The last token of a
  // row has not been through the model yet.
  std::vector<std::vector<int64_t>> advance(int64_t steps);

  std::vector<bool> finished() const;
  void finish(int64_t row);  // from outside: a stop string

 private:
  struct Row {
    SequencePtr sequence;
    Sampler sampler;
    int64_t left;     // tokens
    int64_t pending;  // the last token, -1 before the first
  };
  bool runs_on(const Row& row) const;
  void compute_logits();

  std::shared_ptr<NativeDecoder> decoder_;
  std::vector<Row> rows_;
  at::Tensor logits_;  // [B, V]: at first of all rows, then of those that run on, in their order
  bool starts_ = true;
  std::vector<int64_t> eos_;
};

}  // namespace firstlm
