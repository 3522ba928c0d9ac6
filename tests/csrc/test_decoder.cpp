// A decoder agrees with itself however its work is cut: prompts token by token, sequences in
// batches, teams of any size. That it agrees with transformers is tested from Python.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "buffer.h"
#include "catch.h"
#include "decoder.h"
#include "random_values.h"

namespace firstlm {
namespace {

// A cache without a library behind it: every layer has room for all tokens of a test.
class TestCache final : public SequenceCache {
 public:
  static constexpr int64_t kCapacity = 600;

  explicit TestCache(const DecoderConfig& config) : config_(config), lengths_(config.L) {
    const int64_t bytes =
        config.L * config.H * kCapacity * config.head_dim * size_of(config.cache_dtype);
    keys_.resize(bytes);
    values_.resize(bytes);
  }

  LayerCache reserve(int64_t layer, int64_t T) override {
    REQUIRE(lengths_[layer] + T <= kCapacity);
    const int64_t head = kCapacity * config_.head_dim;
    const int64_t offset = layer * config_.H * head * size_of(config_.cache_dtype);
    const int64_t window = config_.windows[layer].value_or(kCapacity);
    return {keys_.data() + offset, values_.data() + offset, head, lengths_[layer],
            std::max<int64_t>(0, lengths_[layer] - window + 1)};
  }
  void append(int64_t layer, int64_t T) override { lengths_[layer] += T; }

  const std::vector<int64_t>& lengths() const { return lengths_; }

 private:
  const DecoderConfig& config_;
  std::vector<int64_t> lengths_;
  std::vector<char> keys_, values_;
};

DecoderConfig small_config(DType cache_dtype) {
  return {.L = 4,
          .D = 40,
          .I = 48,
          .Hq = 6,
          .H = 2,
          .head_dim = 12,
          .V = 50,
          .norm_eps = 1e-5,
          .attention_scale = 0.3,
          .inverse_frequencies = {1.0f, 0.3f, 0.1f, 0.03f},
          .rope_scaling = 1,
          .rotates = {1, 1, 0, 1},
          .windows = {std::nullopt, 7, std::nullopt, std::nullopt},
          .cache_dtype = cache_dtype};
}

// Random weights, and the memory that they are in.
class SmallModel {
 public:
  // R: the rank of its adapters, none if 0.
  SmallModel(Precision precision, DType cache_dtype, int64_t R = 0)
      : config(small_config(cache_dtype)) {
    const int64_t queries = config.Hq * config.head_dim;
    weights_.embedding = matrix(precision, config.V, config.D, 1);
    weights_.head.weight = weights_.embedding;
    weights_.final_norm = vector(config.D, 1);
    for (int64_t l = 0; l < config.L; ++l) {
      weights_.layers.push_back({
          .attention_norm = vector(config.D, 1),
          .qkv = linear(precision, queries + 2 * config.H * config.head_dim, config.D, true, R),
          .query_norm = l % 2 ? vector(config.head_dim, 1) : nullptr,
          .key_norm = l % 2 ? vector(config.head_dim, 1) : nullptr,
          .output = linear(precision, config.D, queries, l % 2, R),
          .mlp_norm = vector(config.D, 1),
          .gate_up = linear(precision, 2 * config.I, config.D, false, R),
          .down = linear(precision, config.D, config.I, true, R),
      });
      const LayerRouter router{{PoolKind::kWindowedMean, 2},
                               {.F = 2 * config.D,
                                .H = 1,
                                .weight = vector(2 * config.D, 0),
                                .bias = vector(1, 0),
                                .out_weight = nullptr,
                                .out_bias = nullptr,
                                .norm_eps = 1e-6}};
      routers.push_back(router);
    }
  }

  std::unique_ptr<Decoder> decoder(const Kernels& level = kernels()) const {
    return std::make_unique<Decoder>(config, weights_, level);
  }

  DecoderConfig config;
  std::vector<LayerRouter> routers;

 private:
  const float* vector(int64_t n, float mean) {
    std::vector<float> values = random_values<float>(n, ++seed_);
    for (float& value : values) value = mean + 0.2f * value;
    vectors_.push_back(std::move(values));
    return vectors_.back().data();
  }

  Linear linear(Precision precision, int64_t N, int64_t K, bool has_bias, int64_t R) {
    Linear linear{matrix(precision, N, K, 1), has_bias ? vector(N, 0) : nullptr};
    if (R == 0) return linear;
    linear.low_rank.A = matrix(Precision::kBFloat16, R, K, 1);
    const std::vector<float> B = random_values<float>(N * R, ++seed_);
    const int64_t bytes = packed_columns_bytes(B.data(), N, R);
    matrices_.emplace_back();
    std::byte* data = matrices_.back().reserve(bytes);
    pack_columns(B.data(), N, R, data);
    linear.low_rank.B = packed_columns(data, bytes, N, R);
    return linear;
  }

  PackedMatrix matrix(Precision precision, int64_t N, int64_t K, float scale) {
    std::vector<float> values = random_values<float>(N * K, ++seed_);
    for (float& value : values) value *= scale / std::sqrt(static_cast<float>(K));
    PackedMatrix packed{precision, N, K, nullptr};
    matrices_.emplace_back();
    std::byte* data = matrices_.back().reserve(packed.bytes());
    pack_panels(packed, DType::kFloat32, values.data(), K, 0, packed.panels(), data);
    packed.data = data;
    return packed;
  }

  int seed_ = 0;
  DecoderWeights weights_;
  std::vector<std::vector<float>> vectors_;
  std::vector<Buffer<std::byte>> matrices_;
};

struct Conversation {
  std::vector<int64_t> tokens;
  std::vector<uint8_t> keep;
  TestCache cache;

  Conversation(const DecoderConfig& config, int64_t T, int seed)
      : tokens(T), keep(config.L, 1), cache(config) {
    std::mt19937 random(seed);
    for (int64_t& token : tokens) token = random() % config.V;
  }

  // The tokens [first, last); logits of all of them.
  Segment segment(int64_t first, int64_t last) {
    return {.tokens = tokens.data() + first,
            .T = last - first,
            .position = first,
            .cache = &cache,
            .keep = keep.data(),
            .routing = nullptr,
            .keep_prob = nullptr,
            .num_logits = last - first};
  }
};

std::vector<float> run(Decoder& decoder, Team& team, std::vector<Segment> segments) {
  int64_t wanted = 0;
  for (const Segment& segment : segments) wanted += segment.num_logits;
  std::vector<float> logits(wanted * decoder.config().V);
  decoder.forward(team, segments, logits.data());
  return logits;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max<double>(largest, std::abs(a[i] - b[i]));
  return largest;
}

}  // namespace

TEST_CASE("decoder: a prompt in pieces gives the logits of the prompt as a whole") {
  const SmallModel model(Precision::kFloat32, DType::kFloat32);
  Team team(2);
  const int64_t T = 300;  // more than one split
  const std::vector<uint8_t> keep{1, 1, 0, 1};
  Conversation whole(model.config, T, 1);
  whole.keep = keep;
  const auto portable = model.decoder(*available_kernels().front());
  const std::vector<float> expected = run(*portable, team, {whole.segment(0, T)});
  for (const Kernels* level : available_kernels()) {
    CAPTURE(level->isa);
    const auto decoder = model.decoder(*level);
    for (const int64_t step : {1, 7, 299, 300}) {
      Conversation pieces(model.config, T, 1);
      pieces.keep = keep;
      std::vector<float> logits;
      for (int64_t first = 0; first < T; first += step) {
        const auto piece = run(*decoder, team, {pieces.segment(first, std::min(T, first + step))});
        logits.insert(logits.end(), piece.begin(), piece.end());
      }
      CHECK(largest_difference(logits, expected) < 2e-4);
      CHECK(pieces.cache.lengths() == std::vector<int64_t>{T, T, 0, T});
    }
  }
}

TEST_CASE("decoder: neither the batch nor the team changes a bit") {
  const Precision precision =
      GENERATE(Precision::kFloat32, Precision::kBFloat16, Precision::kInt8, Precision::kInt4);
  const SmallModel model(precision, DType::kBFloat16, precision == Precision::kInt4 ? 16 : 0);
  for (const Kernels* level : available_kernels()) {
    CAPTURE(static_cast<int>(precision), level->isa);
    const auto decoder = model.decoder(*level);
    // A prompt of many tokens, one of few, and two sequences that go on with single tokens.
    const std::vector<int64_t> before{0, 0, 5, 270}, added{30, 3, 1, 1};
    const std::vector<std::vector<uint8_t>> keep{
        {1, 1, 1, 1}, {0, 1, 0, 1}, {1, 0, 0, 1}, {0, 1, 1, 0}};
    const auto conversations = [&](Team& team) {
      std::vector<std::unique_ptr<Conversation>> all;
      for (int i = 0; i < 4; ++i) {
        all.push_back(std::make_unique<Conversation>(model.config, before[i] + added[i], i));
        all[i]->keep = keep[i];
        if (before[i] > 0) run(*decoder, team, {all[i]->segment(0, before[i])});
      }
      return all;
    };
    std::vector<float> expected;
    Team one(1);
    const auto alone = conversations(one);
    for (int i = 0; i < 4; ++i) {
      const auto logits = run(*decoder, one, {alone[i]->segment(before[i], before[i] + added[i])});
      expected.insert(expected.end(), logits.begin(), logits.end());
    }
    for (const int size : {1, 2, 5}) {
      Team team(size);
      const auto all = conversations(team);
      std::vector<Segment> segments;
      for (int i = 0; i < 4; ++i) {
        segments.push_back(all[i]->segment(before[i], before[i] + added[i]));
      }
      CHECK(run(*decoder, team, segments) == expected);
    }
  }
}

TEST_CASE("decoder: chunks change nothing") {
  SmallModel whole(Precision::kInt4, DType::kBFloat16, 16);
  const std::vector<float> thresholds(whole.config.L, 0.5f);
  const auto results = [&](const SmallModel& model, int threads) {
    const auto decoder = model.decoder();
    Team team(threads);
    const Routing routing{model.routers.data(), thresholds.data(), true};
    std::vector<std::unique_ptr<Conversation>> all;
    std::vector<float> keep_prob(2 * model.config.L), found;
    const auto append = [&](const std::vector<float>& logits) {
      found.insert(found.end(), logits.begin(), logits.end());
    };
    for (const int64_t T : {61, 33}) {
      all.push_back(std::make_unique<Conversation>(model.config, T, static_cast<int>(T)));
    }
    std::vector<Segment> routed;
    for (int i = 0; i < 2; ++i) {
      routed.push_back(all[i]->segment(0, 20 + 9 * i));
      routed[i].routing = &routing;
      routed[i].keep_prob = &keep_prob[i * model.config.L];
    }
    append(run(*decoder, team, routed));
    append(keep_prob);
    append(run(*decoder, team, {all[0]->segment(20, 60), all[1]->segment(29, 32)}));
    append(run(*decoder, team, {all[0]->segment(60, 61), all[1]->segment(32, 33)}));
    const DecoderCounters& counters = decoder->counters();
    std::vector<int64_t> counts = counters.layer_runs;
    counts.insert(counts.end(), {counters.weight_bytes, counters.segment_runs});
    found.insert(found.end(), counts.begin(), counts.end());
    return found;
  };
  const std::vector<float> expected = results(whole, 2);
  for (const int64_t tokens : {3, 7, 16, 29, 100}) {
    SmallModel chunked(Precision::kInt4, DType::kBFloat16, 16);
    chunked.config.chunk_tokens = tokens;
    CHECK(results(chunked, tokens == 7 ? 3 : 1) == expected);
  }
}

TEST_CASE("decoder: an interrupt leaves the caches as they were") {
  SmallModel model(Precision::kFloat32, DType::kFloat32);
  model.config.chunk_tokens = 8;
  const auto decoder = model.decoder();
  Team team(2);
  Conversation expected(model.config, 60, 1), found(model.config, 60, 1);
  for (Conversation* each : {&expected, &found}) run(*decoder, team, {each->segment(0, 20)});
  for (const int calls : {0, 5, 17}) {
    std::vector<Segment> segments{found.segment(20, 60)};
    std::vector<float> logits(40 * model.config.V);
    int left = calls;
    const auto interrupt = [&] {
      if (left-- == 0) throw std::runtime_error("enough");
    };
    CHECK_THROWS_WITH(decoder->forward(team, segments, logits.data(), interrupt), "enough");
    CHECK(found.cache.lengths() == std::vector<int64_t>(model.config.L, 20));
  }
  CHECK(run(*decoder, team, {found.segment(20, 60)}) ==
        run(*decoder, team, {expected.segment(20, 60)}));
}

TEST_CASE("decoder: a routed prompt gives what its plan gives, and skips or runs what it drops") {
  const SmallModel model(Precision::kFloat32, DType::kFloat32);
  const auto decoder = model.decoder();
  Team team(2);
  const std::vector<float> thresholds(model.config.L, 0.5f);
  bool any_dropped = false;
  for (const int seed : {1, 2, 3, 4, 5}) {
    for (const bool skips : {true, false}) {
      const Routing routing{model.routers.data(), thresholds.data(), skips};
      Conversation routed(model.config, 11, seed), planned(model.config, 11, seed);
      std::vector<float> keep_prob(model.config.L, -1);
      Segment segment = routed.segment(0, 11);
      segment.routing = &routing;
      segment.keep_prob = keep_prob.data();
      std::vector<int64_t> expected_runs = decoder->counters().layer_runs;
      const std::vector<float> logits = run(*decoder, team, {segment});
      const auto is_kept = [](float probability) { return probability >= 0.5f; };
      std::vector<uint8_t> expected;
      for (const float probability : keep_prob) expected.push_back(is_kept(probability));
      // Skipping everything is not a plan.
      if (std::none_of(keep_prob.begin(), keep_prob.end(), is_kept)) expected.back() = 1;
      CHECK(routed.keep == expected);
      for (int64_t l = 0; l < model.config.L; ++l) {
        any_dropped |= !expected[l];
        expected_runs[l] += !skips || expected[l];
      }
      CHECK(decoder->counters().layer_runs == expected_runs);
      if (skips) planned.keep = routed.keep;
      CHECK(run(*decoder, team, {planned.segment(0, 11)}) == logits);
    }
  }
  CHECK(any_dropped);
}

TEST_CASE("decoder: shapes that do not fit the config are named") {
  const SmallModel model(Precision::kFloat32, DType::kFloat32);
  DecoderConfig config = model.config;
  config.I = 40;
  CHECK_THROWS_WITH(Decoder(config, DecoderWeights{}, kernels()),
                    "intermediate_size must be padded to a multiple of 16");
  config = model.config;
  DecoderWeights weights{};
  weights.embedding = {Precision::kFloat32, config.V, 7, nullptr};
  CHECK_THROWS_WITH(Decoder(config, weights, kernels()),
                    "embed_tokens is [50, 7]; the config asks for [50, 40]");
}

}  // namespace firstlm
