// A prompt finds its plan: the router of a layer reads the states that enter it.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "decoder_pass.h"

namespace firstlm {

void Decoder::Pass::reserve_caches(int64_t layer) {
  for (int64_t g = 0; g < G(); ++g) {
    if (!runs(given[g], layer)) continue;
    LayerCache seen = given[g].cache->reserve(layer, given[g].T);
    for (int64_t s = shared.pieces[g]; s < shared.pieces[g + 1]; ++s) {
      cache(layer, s) = seen;
      seen.next_slot += segments[s].T;
      if (!config.windows[layer]) continue;
      seen.visible_slot = std::max(seen.visible_slot, seen.next_slot + 1 - *config.windows[layer]);
    }
  }
}

namespace {

// This thread's columns of the features: pooled [W, D].
void pool_columns(const Kernels& kernels, Share share, Pooling pooling, const float* hidden,
                  int64_t T, int64_t D, Buffer<float>& scratch, float* pooled) {
  const auto [first, last] = share.of((D + 15) / 16);
  const int64_t begin = std::min(D, first * 16), width = std::min(D, last * 16) - begin;
  if (width == 0) return;
  const int64_t offsets[] = {0, T}, W = pooling.W();
  float* columns = scratch.reserve(W * width);  // [W, width]
  const PackedStates states{.data = hidden + begin,
                            .dtype = DType::kFloat32,
                            .N = T,
                            .D = width,
                            .B = 1,
                            .stride_N = D,
                            .offsets = offsets};
  router_pool_packed(kernels, states, pooling, 1, nullptr, columns);
  for (int64_t w = 0; w < W; ++w) {
    std::copy_n(columns + w * width, width, pooled + w * D + begin);
  }
}

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

void Decoder::Pass::route(Share share, int64_t layer) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t D = config.D;
  int64_t width = 0, units = 0;  // the most that any router needs
  for (const Segment& segment : given) {
    if (!segment.routing) continue;
    const LayerRouter& router = segment.routing->routers[layer];
    width = std::max(width, router.pooling.W() * D);
    units = std::max(units, router.head.H);
  }
  if (share.rank == 0) {
    shared.pooled.reserve(G() * width);
    shared.units.reserve(units);
  }
  team.barrier();
  for (int64_t g = 0; g < G(); ++g) {
    const Segment& segment = given[g];
    if (!segment.routing) continue;
    pool_columns(kernels, share, segment.routing->routers[layer].pooling,
                 shared.hidden.data() + first_of(shared.pieces[g]) * D, segment.T, D,
                 shared.threads[share.rank].pooled, shared.pooled.data() + g * width);
  }
  team.barrier();
  if (share.rank == 0) {
    for (int64_t g = 0; g < G(); ++g) {
      Segment& segment = given[g];
      if (!segment.routing) continue;
      float logit;
      router_head(kernels, segment.routing->routers[layer].head, shared.pooled.data() + g * width,
                  1, 1, shared.units.data(), &logit);
      segment.keep_prob[layer] = sigmoid(logit);
      segment.keep[layer] = segment.keep_prob[layer] >= segment.routing->thresholds[layer];
      // Skipping everything is not a plan: such a prompt keeps the last layer.
      const bool keeps_none = std::none_of(segment.keep, segment.keep + layer + 1,
                                           [](uint8_t kept) { return kept != 0; });
      if (layer == config.L - 1 && keeps_none) segment.keep[layer] = 1;
    }
    decoder.counters_.router_nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(
                                                std::chrono::steady_clock::now() - start)
                                                .count();
    reserve_caches(layer);
  }
  team.barrier();
}

}  // namespace firstlm
