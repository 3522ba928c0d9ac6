#include "engine.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <utility>

#include "checks.h"
#include "packing.h"

namespace firstlm {
namespace {

using at::Tensor;
using Tensors = NativeDecoder::Tensors;

// --- Weights by name --------------------------------------------------------------------------

const Tensor& tensor_named(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  TORCH_CHECK_VALUE(found != tensors.end(), "the weights have no tensor ", name);
  return found->second;
}

// f32 [sizes]; null if there is none and that is allowed.
const float* vector_of(const Tensors& tensors, const std::string& name, at::IntArrayRef sizes,
                       bool required) {
  if (!required && !tensors.count(name)) return nullptr;
  const Tensor& tensor = tensor_named(tensors, name);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " is ", tensor.scalar_type(),
                   "; expected float32");
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " has shape ", tensor.sizes(), "; expected ",
                    sizes);
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous(), name,
                    " must be contiguous and on the CPU");
  return tensor.const_data_ptr<float>();
}

PackedMatrix matrix_of(const Tensors& tensors, const std::string& name, Precision precision,
                       int64_t N, int64_t K) {
  return packed_matrix(name, tensor_named(tensors, name), precision, N, K);
}

// `name`.weight and, where they are, .bias and an adapter that is kept apart, .lora_A and .lora_B.
Linear linear_of(const Tensors& tensors, const std::string& name, Precision precision, int64_t N,
                 int64_t K) {
  Linear linear{matrix_of(tensors, name + ".weight", precision, N, K),
                vector_of(tensors, name + ".bias", {N}, false)};
  if (tensors.count(name + ".lora_A")) {
    linear.low_rank = packed_low_rank(name, tensor_named(tensors, name + ".lora_A"),
                                      tensor_named(tensors, name + ".lora_B"), linear.weight);
  }
  return linear;
}

LayerWeights layer_weights(const Tensors& tensors, const DecoderConfig& config, Precision precision,
                           int64_t l) {
  const std::string layer = "layers." + std::to_string(l) + ".";
  const auto linear = [&](const char* name, int64_t N, int64_t K) {
    return linear_of(tensors, layer + name, precision, N, K);
  };
  const auto vector = [&](const char* name, int64_t n, bool required) {
    return vector_of(tensors, layer + name, {n}, required);
  };
  const int64_t D = config.D, I = config.I, d = config.head_dim, queries = config.Hq * d;
  return {
      .attention_norm = vector("input_layernorm.weight", D, true),
      .qkv = linear("self_attn.qkv_proj", queries + 2 * config.H * d, D),
      .query_norm = vector("self_attn.q_norm.weight", d, false),
      .key_norm = vector("self_attn.k_norm.weight", d, false),
      .output = linear("self_attn.o_proj", D, queries),
      .mlp_norm = vector("post_attention_layernorm.weight", D, true),
      .gate_up = linear("mlp.gate_up_proj", 2 * I, D),
      .down = linear("mlp.down_proj", D, I),
  };
}

DecoderWeights decoder_weights(const Tensors& tensors, const DecoderConfig& config,
                               Precision precision, Precision head_precision) {
  DecoderWeights weights;
  const int64_t V = config.V, D = config.D;
  weights.embedding = matrix_of(tensors, "embed_tokens.weight", head_precision, V, D);
  weights.head = tensors.count("lm_head.weight")
                     ? linear_of(tensors, "lm_head", head_precision, V, D)
                     : Linear{weights.embedding};
  weights.final_norm = vector_of(tensors, "norm.weight", {D}, true);
  for (int64_t l = 0; l < config.L; ++l) {
    weights.layers.push_back(layer_weights(tensors, config, precision, l));
  }
  return weights;
}

LayerRouter layer_router(const Tensors& tensors, const std::string& layer, Pooling pooling,
                         double norm_eps, int64_t D) {
  const Tensor& weight = tensor_named(tensors, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 2, layer, " has a weight of shape ", weight.sizes(),
                    "; expected [H, F]");
  const int64_t F = pooling.W() * D, H = weight.size(0);
  const float* out_weight = vector_of(tensors, "out_weight", {1, H}, false);
  TORCH_CHECK_VALUE(out_weight || H == 1, layer, " has ", H,
                    " units and no out_weight; expected 1, the linear head");
  return {pooling,
          {.F = F,
           .H = H,
           .weight = vector_of(tensors, "weight", {H, F}, true),
           .bias = vector_of(tensors, "bias", {H}, true),
           .out_weight = out_weight,
           .out_bias = out_weight ? vector_of(tensors, "out_bias", {1}, true) : nullptr,
           .norm_eps = norm_eps}};
}

at::ScalarType torch_type(DType dtype) {
  return dtype == DType::kFloat32 ? at::kFloat : at::kBFloat16;
}

}  // namespace

// --- Sequence ---------------------------------------------------------------------------------

Sequence::Sequence(const DecoderConfig& config, int64_t decoder)
    : decoder_(decoder),
      H_(config.H),
      head_dim_(config.head_dim),
      dtype_(torch_type(config.cache_dtype)),
      windows_(config.windows),
      storage_(windows_) {}

Sequence::Sequence(const Sequence& other)
    : decoder_(other.decoder_),
      H_(other.H_),
      head_dim_(other.head_dim_),
      dtype_(other.dtype_),
      windows_(other.windows_),
      storage_(SkipCacheStorage::restored(windows_, other.storage_.mask(), other.storage_.saved())),
      keep_(other.keep_),
      length_(other.length_) {}

LayerCache Sequence::reserve(int64_t layer, int64_t T) {
  const LayerStorage& held = storage_.reserve(layer, 1, H_, T, head_dim_, dtype_);
  return {.keys = held.keys.mutable_data_ptr(),
          .values = held.values.mutable_data_ptr(),
          .stride_H = held.books.capacity() * head_dim_,
          .next_slot = held.books.next_slot(),
          .visible_slot = held.books.visible_slot()};
}

void Sequence::crop(int64_t length) {
  TORCH_CHECK_VALUE(length >= 0, "length is ", length, "; expected 0 or more");
  if (length >= length_) return;
  storage_.crop(length);
  length_ = length;
}

void Sequence::restrict_to(const std::vector<uint8_t>& keep) {
  TORCH_CHECK_VALUE(keep.size() == keep_.size(), "keep has ", keep.size(), " layers; expected ",
                    keep_.size(), has_plan() ? "" : ": the sequence has no plan yet");
  storage_.restrict_to(KeepMask(1, static_cast<int64_t>(keep.size()), keep));
  keep_ = keep;
}

void Sequence::passed(int64_t T, const std::vector<uint8_t>& keep) {
  length_ += T;
  if (has_plan()) return;
  keep_ = keep;
  storage_.restrict_to(KeepMask(1, static_cast<int64_t>(keep.size()), keep));
}

// --- Decoder ----------------------------------------------------------------------------------

NativeDecoder::NativeDecoder(DecoderConfig config, const std::string& precision,
                             const std::string& head_precision, Tensors tensors, int num_threads)
    : tensors_(std::move(tensors)), team_(num_threads) {
  static std::atomic<int64_t> count = 0;
  id_ = ++count;
  DecoderWeights weights = decoder_weights(tensors_, config, parse_precision(precision),
                                           parse_precision(head_precision));
  decoder_ = std::make_unique<Decoder>(std::move(config), std::move(weights), kernels());
}

void NativeDecoder::set_routers(Pooling pooling, double norm_eps, bool skips,
                                std::vector<Tensors> layers) {
  const int64_t L = config().L;
  TORCH_CHECK_VALUE(static_cast<int64_t>(layers.size()) == L, "routers of ", layers.size(),
                    " layers were given; the model has ", L);
  std::vector<LayerRouter> routers;
  for (int64_t l = 0; l < L; ++l) {
    routers.push_back(layer_router(layers[l], "the router of layer " + std::to_string(l), pooling,
                                   norm_eps, config().D));
  }
  const std::lock_guard lock(mutex_);
  router_tensors_ = std::move(layers);  // the pointers stay: tensors share their storage
  routers_ = std::move(routers);
  routed_prompts_skip_ = skips;
}

DecoderCounters NativeDecoder::counters() {
  const std::lock_guard lock(mutex_);
  return decoder_->counters();
}

void NativeDecoder::forward(std::vector<Segment>& segments, float* logits,
                            const std::function<void()>& interrupt) {
  const std::lock_guard lock(mutex_);
  decoder_->forward(team_, segments, logits, interrupt);
}

void NativeDecoder::check_own(const Sequence& sequence, size_t index) const {
  TORCH_CHECK_VALUE(sequence.decoder() == id_, "sequence ", index,
                    " is of another decoder: its keys and values are of other weights");
}

void NativeDecoder::check(const ExtendRequest& request) const {
  const size_t B = request.sequences.size();
  const int64_t L = config().L, V = config().V;
  TORCH_CHECK_VALUE(B > 0, "no sequences were given");
  TORCH_CHECK_VALUE(request.tokens.size() == B && request.num_logits.size() == B, "tokens of ",
                    request.tokens.size(), " and num_logits of ", request.num_logits.size(),
                    " sequences were given; expected ", B);
  TORCH_CHECK_VALUE(
      std::set<SequencePtr>(request.sequences.begin(), request.sequences.end()).size() == B,
      "a sequence was given twice");
  TORCH_CHECK_VALUE(!(request.keep && request.thresholds),
                    "keep and thresholds were both given; expected one of them");
  if (request.keep) {
    check_shape("keep", *request.keep, {static_cast<int64_t>(B), L}, "[B, L]");
    TORCH_CHECK_TYPE(request.keep->scalar_type() == at::kBool && request.keep->device().is_cpu(),
                     "keep is ", request.keep->scalar_type(), " on ", request.keep->device(),
                     "; expected bool on the CPU");
  }
  if (request.thresholds) {
    TORCH_CHECK_VALUE(!routers_.empty(), "this decoder has no routers: give keep");
    TORCH_CHECK_VALUE(static_cast<int64_t>(request.thresholds->size()) == L, "thresholds of ",
                      request.thresholds->size(), " layers were given; the model has ", L);
  }
  const bool fresh = request.keep || request.thresholds;
  for (size_t b = 0; b < B; ++b) {
    check_own(*request.sequences[b], b);
    const auto& tokens = request.tokens[b];
    TORCH_CHECK_VALUE(!tokens.empty(), "sequence ", b, " has no new tokens");
    for (const int64_t token : tokens) {
      TORCH_CHECK_VALUE(token >= 0 && token < V, "token ", token, " of sequence ", b,
                        " is outside of the vocabulary, [0, ", V, ")");
    }
    const int64_t wanted = request.num_logits[b];
    TORCH_CHECK_VALUE(wanted >= 0 && wanted <= static_cast<int64_t>(tokens.size()),
                      "num_logits is ", wanted, " for ", tokens.size(), " tokens");
    TORCH_CHECK_VALUE(request.sequences[b]->has_plan() != fresh, "sequence ", b,
                      fresh ? " has a plan already: give neither keep nor thresholds"
                            : " has no plan yet: give keep or thresholds");
  }
}

ExtendResult NativeDecoder::extend(const ExtendRequest& request,
                                   const std::function<void()>& interrupt) {
  check(request);
  const auto B = static_cast<int64_t>(request.sequences.size());
  const int64_t L = config().L;
  const Tensor given = request.keep ? request.keep->contiguous() : Tensor();
  std::vector<std::vector<uint8_t>> keep(B);
  ExtendResult result;
  int64_t wanted = 0;
  for (const int64_t n : request.num_logits) wanted += n;
  result.logits = at::empty({wanted, config().V}, at::kFloat);
  Routing routing{};
  if (request.thresholds) {
    result.keep_prob = at::empty({B, L}, at::kFloat);
    routing = {routers_.data(), request.thresholds->data(), routed_prompts_skip_};
  }
  std::vector<Segment> segments;
  for (int64_t b = 0; b < B; ++b) {
    keep[b] = request.sequences[b]->keep();
    keep[b].resize(L, 1);
    if (request.keep) std::copy_n(given.const_data_ptr<bool>() + b * L, L, keep[b].begin());
    float* keep_prob =
        result.keep_prob ? result.keep_prob->mutable_data_ptr<float>() + b * L : nullptr;
    segments.push_back({.tokens = request.tokens[b].data(),
                        .T = static_cast<int64_t>(request.tokens[b].size()),
                        .position = request.sequences[b]->length(),
                        .cache = request.sequences[b].get(),
                        .keep = keep[b].data(),
                        .routing = request.thresholds ? &routing : nullptr,
                        .keep_prob = keep_prob,
                        .num_logits = request.num_logits[b]});
  }
  forward(segments, result.logits.mutable_data_ptr<float>(), interrupt);
  for (int64_t b = 0; b < B; ++b) request.sequences[b]->passed(segments[b].T, keep[b]);
  return result;
}

void NativeDecoder::step(const std::vector<SequencePtr>& sequences,
                         const std::vector<int64_t>& tokens, float* logits) {
  std::vector<Segment> segments;
  segments.reserve(sequences.size());
  for (size_t b = 0; b < sequences.size(); ++b) {
    Sequence& sequence = *sequences[b];
    segments.push_back({.tokens = &tokens[b],
                        .T = 1,
                        .position = sequence.length(),
                        .cache = &sequence,
                        // Read only: the segment is not routed.
                        .keep = const_cast<uint8_t*>(sequence.keep().data()),
                        .routing = nullptr,
                        .keep_prob = nullptr,
                        .num_logits = 1});
  }
  forward(segments, logits);
  for (const SequencePtr& sequence : sequences) sequence->passed(1, sequence->keep());
}

// --- Decoding ---------------------------------------------------------------------------------

Decoding::Decoding(std::shared_ptr<NativeDecoder> decoder, std::vector<SequencePtr> sequences,
                   Tensor logits, const std::vector<SamplingSettings>& settings,
                   const std::vector<std::vector<int64_t>>& seen, std::vector<int64_t> eos,
                   std::vector<int64_t> max_new_tokens)
    : decoder_(std::move(decoder)), logits_(std::move(logits)), eos_(std::move(eos)) {
  const size_t B = sequences.size();
  const int64_t V = decoder_->config().V;
  TORCH_CHECK_VALUE(settings.size() == B && seen.size() == B && max_new_tokens.size() == B,
                    "settings, seen and max_new_tokens need one entry for each of ", B,
                    " sequences");
  check_shape("logits", logits_, {static_cast<int64_t>(B), V}, "[B, V]");
  TORCH_CHECK_VALUE(
      logits_.scalar_type() == at::kFloat && logits_.is_contiguous() && logits_.device().is_cpu(),
      "logits must be contiguous float32 on the CPU");
  for (size_t b = 0; b < B; ++b) {
    decoder_->check_own(*sequences[b], b);
    TORCH_CHECK_VALUE(sequences[b]->has_plan(), "sequence ", b,
                      " has no plan yet: extend it first");
    settings[b].check();
    rows_.push_back({sequences[b], Sampler(settings[b], V), max_new_tokens[b], -1});
    for (const int64_t token : seen[b]) {
      TORCH_CHECK_VALUE(token >= 0 && token < V, "token ", token,
                        " is outside of the vocabulary, [0, ", V, ")");
      rows_.back().sampler.note(token);
    }
  }
}

bool Decoding::runs_on(const Row& row) const {
  if (row.pending < 0) return row.left > 0;
  return row.left > 0 && std::find(eos_.begin(), eos_.end(), row.pending) == eos_.end();
}

std::vector<bool> Decoding::finished() const {
  std::vector<bool> finished;
  for (const Row& row : rows_) finished.push_back(!runs_on(row));
  return finished;
}

void Decoding::finish(int64_t row) {
  TORCH_CHECK_INDEX(row >= 0 && row < static_cast<int64_t>(rows_.size()), "row is ", row,
                    "; expected [0, ", rows_.size(), ")");
  rows_[row].left = 0;
}

// Runs the pending tokens of the rows that go on.
void Decoding::compute_logits() {
  std::vector<SequencePtr> sequences;
  std::vector<int64_t> tokens;
  for (const Row& row : rows_) {
    if (!runs_on(row)) continue;
    sequences.push_back(row.sequence);
    tokens.push_back(row.pending);
  }
  if (!tokens.empty()) decoder_->step(sequences, tokens, logits_.mutable_data_ptr<float>());
}

std::vector<std::vector<int64_t>> Decoding::advance(int64_t steps) {
  std::vector<std::vector<int64_t>> found(rows_.size());
  const int64_t V = decoder_->config().V;
  for (int64_t i = 0; i < steps; ++i) {
    const bool first = std::exchange(starts_, false);
    if (!first) compute_logits();
    float* logits = logits_.mutable_data_ptr<float>();
    bool any = false;
    for (size_t b = 0; b < rows_.size(); ++b) {
      Row& row = rows_[b];
      if (runs_on(row)) {
        row.pending = row.sampler.sample(logits);
        row.sampler.note(row.pending);
        --row.left;
        found[b].push_back(row.pending);
        any = true;
      } else if (!first) {
        continue;  // it has no logits
      }
      logits += V;
    }
    if (!any) break;
  }
  return found;
}

}  // namespace firstlm
