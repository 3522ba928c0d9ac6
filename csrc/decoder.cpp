#include "decoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "arithmetic.h"
#include "decoder_pass.h"

namespace firstlm {
namespace {

// So few tokens every thread prepares for itself, which is cheaper than to wait for the others.
constexpr int64_t kFewTokens = 8;

void check_matrix(const std::string& name, const PackedMatrix& matrix, int64_t N, int64_t K) {
  if (matrix.N == N && matrix.K == K) return;
  throw std::invalid_argument(name + " is [" + std::to_string(matrix.N) + ", " +
                              std::to_string(matrix.K) + "]; the config asks for [" +
                              std::to_string(N) + ", " + std::to_string(K) + "]");
}

void check_linear(const std::string& name, const Linear& linear, int64_t N, int64_t K) {
  check_matrix(name, linear.weight, N, K);
  const LowRank& low_rank = linear.low_rank;
  if (low_rank.R() == 0 || (low_rank.A.K == K && low_rank.B.N == N)) return;
  throw std::invalid_argument("the adapter of " + name + " has " + std::to_string(low_rank.A.K) +
                              " inputs and " + std::to_string(low_rank.B.N) +
                              " outputs; the config asks for " + std::to_string(K) + " and " +
                              std::to_string(N));
}

void check_config(const DecoderConfig& config) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
  };
  require(config.L > 0 && config.D > 0 && config.I > 0 && config.V > 0 && config.head_dim > 0,
          "sizes of a decoder must be positive");
  require(config.I % kPanelRows == 0, "intermediate_size must be padded to a multiple of 16");
  require(config.H > 0 && config.Hq % config.H == 0,
          "num_attention_heads must be a multiple of num_key_value_heads");
  require(2 * static_cast<int64_t>(config.inverse_frequencies.size()) <= config.head_dim,
          "the rotary embedding turns more than head_dim elements");
  const auto L = static_cast<size_t>(config.L);
  require(config.rotates.size() == L && config.windows.size() == L,
          "rotates and windows need one entry a layer");
  require(config.cache_dtype == DType::kFloat32 || config.cache_dtype == DType::kBFloat16,
          "keys and values are kept in float32 or bfloat16");
  // A prompt of more tokens can then be cut without a piece of a single token, see cut.
  require(config.chunk_tokens > 2, "chunk_tokens must be 3 or more");
}

void check_weights(const DecoderConfig& config, const DecoderWeights& weights) {
  check_matrix("embed_tokens", weights.embedding, config.V, config.D);
  check_linear("lm_head", weights.head, config.V, config.D);
  if (static_cast<int64_t>(weights.layers.size()) != config.L) {
    throw std::invalid_argument("weights of " + std::to_string(weights.layers.size()) +
                                " layers were given; the config has " + std::to_string(config.L));
  }
  const int64_t queries = config.Hq * config.head_dim;
  for (int64_t l = 0; l < config.L; ++l) {
    const LayerWeights& layer = weights.layers[l];
    const std::string name = "layers." + std::to_string(l) + ".";
    check_linear(name + "qkv_proj", layer.qkv, queries + 2 * config.H * config.head_dim, config.D);
    check_linear(name + "o_proj", layer.output, config.D, queries);
    check_linear(name + "gate_up_proj", layer.gate_up, 2 * config.I, config.D);
    check_linear(name + "down_proj", layer.down, config.D, config.I);
  }
}

int64_t outputs_of(const PackedMatrix& matrix, int64_t panel) {
  return std::min(matrix.N, panel * kPanelRows);
}

// The greatest rank of an adapter.
int64_t max_rank(const DecoderWeights& weights) {
  int64_t R = weights.head.low_rank.R();
  for (const LayerWeights& layer : weights.layers) {
    for (const Linear* linear : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
      R = std::max(R, linear->low_rank.R());
    }
  }
  return R;
}

}  // namespace

Decoder::Decoder(DecoderConfig config, DecoderWeights weights, const Kernels& kernels)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      kernels_(kernels),
      rope_(config_.inverse_frequencies, config_.rope_scaling),
      buffers_(std::make_unique<Buffers>()) {
  check_config(config_);
  check_weights(config_, weights_);
  counters_.layer_runs.resize(config_.L);
}

Decoder::~Decoder() = default;

const DecoderConfig& Decoder::config() const { return config_; }
const DecoderCounters& Decoder::counters() const { return counters_; }

void Decoder::forward(Team& team, std::vector<Segment>& segments, float* logits,
                      const std::function<void()>& interrupt) {
  if (segments.empty()) return;
  Pass(*this, team, segments, logits, interrupt).run();
}

// --- One forward ------------------------------------------------------------------------------

Decoder::Pass::Pass(Decoder& decoder, Team& team, std::vector<Segment>& given, float* logits,
                    const std::function<void()>& interrupt)
    : decoder(decoder),
      team(team),
      given(given),
      logits(logits),
      interrupt(interrupt),
      config(decoder.config_),
      kernels(decoder.kernels_),
      shared(*decoder.buffers_),
      segments(shared.segments),
      routes(false) {
  cut();
  N = shared.first.back();
  const int64_t queries = config.Hq * config.head_dim;
  width = std::max({queries + 2 * config.H * config.head_dim, 2 * config.I, config.D});
  splits = 0;
  for (const Segment& segment : segments) {
    routes |= segment.routing != nullptr;
    if (segment.T == 1) splits = std::max(splits, ceil_div(segment.position + 1, kSlotsPerSplit));
  }
  const int64_t C = largest_chunk();
  shared.hidden.reserve(N * config.D);
  shared.normed.reserve(C * config.D);
  shared.cosines.reserve(N * decoder.rope_.rotated_dim() / 2);
  shared.sines.reserve(N * decoder.rope_.rotated_dim() / 2);
  shared.projected.reserve(C * width);
  shared.inner.reserve(C * width);
  shared.low_rank.reserve(C * max_rank(decoder.weights_));
  shared.maxima.reserve(C * config.Hq * splits);
  shared.totals.reserve(C * config.Hq * splits);
  shared.sums.reserve(C * config.Hq * splits * padded_head_dim(config.head_dim));
  shared.caches.resize(config.L * S());
  shared.threads.resize(std::max<size_t>(shared.threads.size(), team.size()));
}

// A given segment of more tokens than a chunk takes becomes several of about the same size, none of
// a single token: those have an attention of their own, which differs in the last bits. A chunk
// takes as many segments as fit.
void Decoder::Pass::cut() {
  segments.clear();
  shared.pieces.assign(1, 0);
  shared.first.assign(1, 0);
  shared.chunks.assign(1, 0);
  int64_t begin = 0;  // of the chunk, among the N
  for (const Segment& segment : given) {
    const int64_t count = ceil_div(segment.T, config.chunk_tokens);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = segment.T * i / count, last = segment.T * (i + 1) / count;
      Segment piece = segment;
      piece.tokens += first;
      piece.T = last - first;
      piece.position += first;
      const int64_t start = shared.first.back();
      if (start > begin && start + piece.T - begin > config.chunk_tokens) {
        shared.chunks.push_back(S());
        begin = start;
      }
      segments.push_back(piece);
      shared.first.push_back(start + piece.T);
    }
    shared.pieces.push_back(S());
  }
  shared.chunks.push_back(S());
}

int64_t Decoder::Pass::largest_chunk() const {
  int64_t C = 0;
  for (int64_t c = 0; c < num_chunks(); ++c) {
    C = std::max(C, first_of(shared.chunks[c + 1]) - first_of(shared.chunks[c]));
  }
  return C;
}

void Decoder::Pass::run() {
  if (!routes) {
    for (int64_t l = 0; l < config.L; ++l) reserve_caches(l);
  }
  team.run([this](Share share) { run_share(share); });
  for (const Segment& segment : given) {
    for (int64_t l = 0; l < config.L; ++l) {
      if (runs(segment, l)) segment.cache->append(l, segment.T);
    }
  }
  ++decoder.counters_.forwards;
}

void Decoder::Pass::run_share(Share share) {
  ActiveTokens& active = shared.threads[share.rank].active;
  embed(share);
  for (int64_t l = 0; l < config.L; ++l) {
    if (routes) route(share, l);
    bool first_chunk = true;
    for (int64_t c = 0; c < num_chunks(); ++c) {
      if (share.rank == 0 && interrupt) interrupt();
      find_active(l, c, active);
      if (active.segments.empty()) continue;
      if (share.rank == 0) count(l, first_chunk);
      first_chunk = false;
      run_attention(share, l);
      run_mlp(share, l);
    }
  }
  write_logits(share);
}

void Decoder::Pass::embed(Share share) {
  const int64_t half = decoder.rope_.rotated_dim() / 2;
  const auto [first, last] = share.of(N);
  int64_t s = 0;
  for (int64_t n = first; n < last; ++n) {
    while (shared.first[s + 1] <= n) ++s;
    const int64_t t = n - first_of(s);
    unpack_row(decoder.weights_.embedding, segments[s].tokens[t],
               shared.hidden.data() + n * config.D);
    decoder.rope_.angles(segments[s].position + t, shared.cosines.data() + n * half,
                         shared.sines.data() + n * half);
  }
  team.barrier();
}

void Decoder::Pass::find_active(int64_t layer, int64_t chunk, ActiveTokens& active) const {
  active.segments.clear();
  active.first.clear();
  active.rows.clear();
  for (int64_t s = shared.chunks[chunk]; s < shared.chunks[chunk + 1]; ++s) {
    if (!runs(segments[s], layer)) continue;
    active.segments.push_back(s);
    active.first.push_back(active.A());
    for (int64_t n = first_of(s); n < first_of(s + 1); ++n) active.rows.push_back(n);
  }
}

// A layer's weights count once, however many chunks there are.
void Decoder::Pass::count(int64_t layer, bool first_chunk) {
  const ActiveTokens& active = shared.threads[0].active;
  const LayerWeights& weights = decoder.weights_.layers[layer];
  DecoderCounters& counters = decoder.counters_;
  if (first_chunk) {
    counters.layer_runs[layer] += 1;
    counters.weight_bytes += weights.qkv.bytes() + weights.output.bytes() +
                             weights.gate_up.bytes() + weights.down.bytes();
    for (const Segment& segment : given) counters.segment_runs += runs(segment, layer);
  }
  for (const int64_t s : active.segments) {
    const LayerCache& seen = cache(layer, s);
    const int64_t slots = seen.next_slot + segments[s].T - seen.visible_slot;
    counters.cache_bytes += 2 * slots * config.H * config.head_dim * size_of(config.cache_dtype);
  }
}

// --- A layer ----------------------------------------------------------------------------------

void Decoder::Pass::run_attention(Share share, int64_t layer) {
  const LayerWeights& weights = decoder.weights_.layers[layer];
  const ActiveTokens& active = shared.threads[share.rank].active;
  const std::byte* input =
      prepare_normed(share, weights.qkv, weights.attention_norm, active.rows.data(), active.A());
  const auto [first, last] = share.of(weights.qkv.weight.panels());
  multiply(weights.qkv, input, active.A(), first, last, shared.projected.data(), width);
  team.barrier();
  attend(share, layer);
  team.barrier();
  input = prepare(share, weights.output, shared.inner.data(), width, active.A());
  add_product(share, weights.output, input, active);
  team.barrier();
}

void Decoder::Pass::run_mlp(Share share, int64_t layer) {
  const LayerWeights& weights = decoder.weights_.layers[layer];
  const ActiveTokens& active = shared.threads[share.rank].active;
  const std::byte* input =
      prepare_normed(share, weights.gate_up, weights.mlp_norm, active.rows.data(), active.A());
  // A panel of gates and its panel of ups stay together.
  const auto [first, last] = share.of(config.I / kPanelRows);
  float* gate_up = shared.projected.data();
  float* inner = shared.inner.data();
  multiply(weights.gate_up, input, active.A(), 2 * first, 2 * last, gate_up, width);
  for (int64_t a = 0; a < active.A(); ++a) {
    silu_and_multiply(kernels, gate_up + a * width + 2 * first * kPanelRows,
                      (last - first) * kPanelRows, inner + a * width + first * kPanelRows);
  }
  team.barrier();
  input = prepare(share, weights.down, inner, width, active.A());
  add_product(share, weights.down, input, active);
  team.barrier();
}

const std::byte* Decoder::Pass::prepare(Share share, const Linear& linear, const float* x,
                                        int64_t stride, int64_t A) {
  const Precision precision = linear.weight.precision;
  const int64_t K = linear.weight.K;
  const Share::Range panels{0, linear.low_rank.A.panels()};
  const int64_t bytes = input_bytes(kernels, precision, A, K);
  if (A <= kFewTokens) {
    std::byte* input = shared.threads[share.rank].input.reserve(bytes);
    prepare_input(kernels, precision, x, stride, A, K, 0, A, input);
    multiply_A(share, linear.low_rank, x, stride, {0, A}, share.of(panels.last));
    return input;
  }
  // Reserved by one thread: the others see the pointer after the barrier.
  if (share.rank == 0) shared.input.reserve(bytes);
  team.barrier();
  const Share::Range tokens = share.of(A);
  prepare_input(kernels, precision, x, stride, A, K, tokens.first, tokens.last,
                shared.input.data());
  multiply_A(share, linear.low_rank, x, stride, tokens, panels);
  team.barrier();
  return shared.input.data();
}

const std::byte* Decoder::Pass::prepare_normed(Share share, const Linear& linear, const float* norm,
                                               const int64_t* rows, int64_t A) {
  const int64_t D = config.D;
  const bool few = A <= kFewTokens;
  float* normed =
      few ? shared.threads[share.rank].normed.reserve(kFewTokens * D) : shared.normed.data();
  const auto [first, last] = few ? Share::Range{0, A} : share.of(A);
  for (int64_t a = first; a < last; ++a) {
    rms_norm(kernels, shared.hidden.data() + rows[a] * D, norm, D, config.norm_eps, normed + a * D);
  }
  return prepare(share, linear, normed, D, A);
}

void Decoder::Pass::multiply_A(Share share, const LowRank& low_rank, const float* x, int64_t stride,
                               Share::Range tokens, Share::Range panels) {
  const int64_t M = tokens.last - tokens.first, K = low_rank.A.K, R = low_rank.R();
  if (M == 0 || R == 0) return;
  const Precision precision = low_rank.A.precision;
  std::byte* input =
      shared.threads[share.rank].A_input.reserve(input_bytes(kernels, precision, M, K));
  prepare_input(kernels, precision, x + tokens.first * stride, stride, M, K, 0, M, input);
  firstlm::multiply(kernels, low_rank.A, input, M, panels.first, panels.last,
                    shared.low_rank.data() + tokens.first * R, R);
}

void Decoder::Pass::multiply(const Linear& linear, const std::byte* input, int64_t A, int64_t first,
                             int64_t last, float* y, int64_t stride) {
  firstlm::multiply(kernels, linear.weight, input, A, first, last, y, stride);
  const int64_t R = linear.low_rank.R();
  if (R > 0) {
    if (A <= kFewTokens) team.barrier();  // the threads shared A's panels
    add_columns(kernels, linear.low_rank.B, shared.low_rank.data(), R, A, first, last, y, stride);
  }
  if (!linear.bias) return;
  for (int64_t a = 0; a < A; ++a) {
    for (int64_t n = outputs_of(linear.weight, first); n < outputs_of(linear.weight, last); ++n) {
      y[a * stride + n] += linear.bias[n];
    }
  }
}

void Decoder::Pass::add_product(Share share, const Linear& linear, const std::byte* input,
                                const ActiveTokens& active) {
  const auto [first, last] = share.of(linear.weight.panels());
  float* y = shared.projected.data();
  multiply(linear, input, active.A(), first, last, y, width);
  const int64_t begin = outputs_of(linear.weight, first), end = outputs_of(linear.weight, last);
  for (int64_t a = 0; a < active.A(); ++a) {
    float* hidden = shared.hidden.data() + active.rows[a] * config.D;
    for (int64_t n = begin; n < end; ++n) hidden[n] += y[a * width + n];
  }
}

// --- After the last layer ---------------------------------------------------------------------

void Decoder::Pass::write_logits(Share share) {
  const Linear& head = decoder.weights_.head;
  std::vector<int64_t>& rows = shared.threads[share.rank].active.rows;
  rows.clear();
  for (int64_t g = 0; g < G(); ++g) {
    const int64_t end = first_of(shared.pieces[g + 1]);
    for (int64_t n = end - given[g].num_logits; n < end; ++n) rows.push_back(n);
  }
  const auto wanted = static_cast<int64_t>(rows.size());
  if (wanted == 0) return;
  const auto [first, last] = share.of(head.weight.panels());
  const int64_t step = largest_chunk();
  for (int64_t begin = 0; begin < wanted; begin += step) {
    if (begin > 0) team.barrier();  // the buffers are free again
    const int64_t A = std::min(step, wanted - begin);
    const std::byte* input =
        prepare_normed(share, head, decoder.weights_.final_norm, rows.data() + begin, A);
    multiply(head, input, A, first, last, logits + begin * config.V, config.V);
  }
  if (share.rank == 0) decoder.counters_.weight_bytes += head.bytes();
}

}  // namespace firstlm
