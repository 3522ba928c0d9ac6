// Attention of a layer's active segments: prompts block by block, single tokens split by split.
#include <algorithm>
#include <cstring>

#include "arithmetic.h"
#include "decoder_pass.h"
#include "prefill_attention.h"

namespace firstlm {
namespace {

void store_elements(DType dtype, const float* from, int64_t n, void* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  auto* elements = static_cast<BFloat16*>(to);
  for (int64_t i = 0; i < n; ++i) narrow(from[i], elements + i);
}

char* slot_of(void* data, const LayerCache& cache, int64_t head, int64_t slot, int64_t head_dim,
              DType dtype) {
  return static_cast<char*>(data) + (head * cache.stride_H + slot * head_dim) * size_of(dtype);
}

}  // namespace

// A query or key head, normalised where `norm` is given, and rotated as the layer says.
void Decoder::Pass::rotate_head(int64_t layer, int64_t row, const float* from, const float* norm,
                                float* to) const {
  const int64_t d = config.head_dim, half = decoder.rope_.rotated_dim() / 2;
  if (norm) {
    rms_norm(kernels, from, norm, d, config.norm_eps, to);
  } else {
    std::copy_n(from, d, to);
  }
  if (config.rotates[layer]) {
    rotate(kernels, shared.cosines.data() + row * half, shared.sines.data() + row * half, half, to);
  }
}

// The queries of a group, ready to be multiplied with keys: to [G, head_dim] in rows of padded
// head_dim, without the scale.
void Decoder::Pass::rotate_queries(int64_t layer, int64_t token, int64_t row, int64_t kv_head,
                                   float* to) const {
  const int64_t d = config.head_dim, padded = padded_head_dim(d);
  const float* norm = decoder.weights_.layers[layer].query_norm;
  const float* from = shared.projected.data() + token * width + kv_head * group() * d;
  for (int64_t g = 0; g < group(); ++g) {
    rotate_head(layer, row, from + g * d, norm, to + g * padded);
  }
}

void Decoder::Pass::store_token(int64_t layer, const LayerCache& cache, int64_t token, int64_t row,
                                int64_t kv_head, int64_t slot, float* scratch) const {
  const int64_t d = config.head_dim;
  const float* key = shared.projected.data() + token * width + (config.Hq + kv_head) * d;
  const float* value = key + config.H * d;
  rotate_head(layer, row, key, decoder.weights_.layers[layer].key_norm, scratch);
  const DType dtype = config.cache_dtype;
  store_elements(dtype, scratch, d, slot_of(cache.keys, cache, kv_head, slot, d, dtype));
  store_elements(dtype, value, d, slot_of(cache.values, cache, kv_head, slot, d, dtype));
}

void Decoder::Pass::attend(Share share, int64_t layer) {
  const ActiveTokens& active = shared.threads[share.rank].active;
  const auto is_prompt = [&](int64_t s) { return segments[s].T > 1; };
  if (std::any_of(active.segments.begin(), active.segments.end(), is_prompt)) {
    store_prompts(share, layer);
    team.barrier();
    attend_prompts(share, layer);
  }
  if (!std::all_of(active.segments.begin(), active.segments.end(), is_prompt)) {
    attend_single_tokens(share, layer);
  }
}

// --- Prompts ----------------------------------------------------------------------------------

// Rotates this thread's tokens of every prompt, queries in place, and writes keys and values.
void Decoder::Pass::store_prompts(Share share, int64_t layer) {
  ThreadScratch& own = shared.threads[share.rank];
  const int64_t d = config.head_dim, padded = padded_head_dim(d);
  float* heads = own.heads.reserve((group() + 1) * padded);
  for (size_t i = 0; i < own.active.segments.size(); ++i) {
    const int64_t s = own.active.segments[i];
    if (segments[s].T == 1) continue;
    const LayerCache& to = cache(layer, s);
    const auto [first, last] = share.of(segments[s].T);
    for (int64_t t = first; t < last; ++t) {
      const int64_t token = own.active.first[i] + t, row = first_of(s) + t;
      for (int64_t h = 0; h < config.H; ++h) {
        store_token(layer, to, token, row, h, to.next_slot + t, heads);
        rotate_queries(layer, token, row, h, heads);
        float* query = shared.projected.data() + token * width + h * group() * d;
        for (int64_t g = 0; g < group(); ++g) std::copy_n(heads + g * padded, d, query + g * d);
      }
    }
  }
}

void Decoder::Pass::attend_prompts(Share share, int64_t layer) {
  ThreadScratch& own = shared.threads[share.rank];
  for (size_t i = 0; i < own.active.segments.size(); ++i) {
    const int64_t s = own.active.segments[i], token = own.active.first[i];
    if (segments[s].T == 1) continue;
    const LayerCache& from = cache(layer, s);
    const PrefillAttention attention{
        .dtype = config.cache_dtype,
        .T = segments[s].T,
        .Hq = config.Hq,
        .H = config.H,
        .D = config.head_dim,
        .query = shared.projected.data() + token * width,
        .stride_T = width,
        .keys = from.keys,
        .values = from.values,
        .stride_H = from.stride_H,
        .first_slot = from.next_slot,
        .begin = from.visible_slot,
        .window = config.windows[layer].value_or(0),
        .scale = config.attention_scale,
    };
    std::byte* scratch = own.attention.reserve(prefill_attention_scratch(attention));
    prefill_attention(kernels, attention, share, scratch, shared.inner.data() + token * width);
  }
}

// --- Single tokens ----------------------------------------------------------------------------

namespace {

// A token's slots [begin, end) of the cache, cut in splits.
struct SeenSlots {
  int64_t begin, end;

  explicit SeenSlots(const LayerCache& cache)
      : begin(cache.visible_slot), end(cache.next_slot + 1) {}
  int64_t splits() const { return ceil_div(end - begin, kSlotsPerSplit); }
};

}  // namespace

// All splits of all groups are shared out evenly.
void Decoder::Pass::attend_single_tokens(Share share, int64_t layer) {
  const ActiveTokens& active = shared.threads[share.rank].active;
  const auto for_each_token = [&](const auto& body) {
    for (size_t i = 0; i < active.segments.size(); ++i) {
      const int64_t s = active.segments[i];
      if (segments[s].T == 1) body(s, active.first[i], SeenSlots(cache(layer, s)).splits());
    }
  };
  int64_t total = 0;
  for_each_token([&](int64_t, int64_t, int64_t count) { total += count * config.H; });
  const auto mine = share.of(total);
  int64_t before = 0;  // splits of the groups before
  for_each_token([&](int64_t s, int64_t token, int64_t count) {
    for (int64_t h = 0; h < config.H; ++h, before += count) {
      const int64_t first = std::max(mine.first - before, int64_t(0));
      const int64_t last = std::min(mine.last - before, count);
      if (first < last) attend_group(share, layer, s, token, h, first, last);
    }
  });
  if (splits == 1) return;  // merged already
  team.barrier();
  const auto heads = share.of(config.Hq);
  for_each_token([&](int64_t, int64_t token, int64_t count) {
    for (int64_t head = heads.first; head < heads.last; ++head) merge_head(token, head, count);
  });
}

// Splits [first, last) of one group. The thread that has the last one first writes the new key and
// value, which only that split reads.
void Decoder::Pass::attend_group(Share share, int64_t layer, int64_t segment, int64_t token,
                                 int64_t kv_head, int64_t first, int64_t last) {
  const int64_t d = config.head_dim, padded = padded_head_dim(d), G = group();
  const DType dtype = config.cache_dtype;
  const LayerCache& of = cache(layer, segment);
  const SeenSlots seen(of);
  float* queries = shared.threads[share.rank].heads.reserve((G + 1) * padded);
  if (last == seen.splits()) {
    store_token(layer, of, token, first_of(segment), kv_head, of.next_slot, queries + G * padded);
  }
  rotate_queries(layer, token, first_of(segment), kv_head, queries);
  for (float* query = queries; query < queries + G * padded; query += padded) {
    std::fill(query + d, query + padded, 0.0f);
  }
  const int64_t at = (token * config.Hq + kv_head * G) * splits;
  for (int64_t split = first; split < last; ++split) {
    const int64_t slot = seen.begin + split * kSlotsPerSplit;
    const int64_t slots = std::min(kSlotsPerSplit, seen.end - slot);
    const int64_t left = split + 1 < last ? seen.end - slot - slots : 0;
    kernels.attend[static_cast<int>(dtype)]({
        .G = G,
        .D = d,
        .slots = slots,
        .next_slots = std::min(kSlotsPerSplit, left),
        .queries = queries,
        .keys = slot_of(of.keys, of, kv_head, slot, d, dtype),
        .values = slot_of(of.values, of, kv_head, slot, d, dtype),
        .stride_keys = d,
        .stride_values = d,
        .scale = config.attention_scale,
        .soft_cap = 0,
        .stride_totals = splits,
        .stride_sums = splits * padded,
        .maxima = shared.maxima.data() + at + split,
        .totals = shared.totals.data() + at + split,
        .sums = shared.sums.data() + (at + split) * padded,
    });
  }
  if (splits > 1) return;
  for (int64_t g = 0; g < G; ++g) merge_head(token, kv_head * G + g, 1);
}

void Decoder::Pass::merge_head(int64_t token, int64_t head, int64_t count) {
  const int64_t at = (token * config.Hq + head) * splits;
  // Partials are f32 whatever the cache is, and so is the output.
  kernels.merge_splits[static_cast<int>(DType::kFloat32)]({
      .splits = count,
      .D = config.head_dim,
      .maxima = shared.maxima.data() + at,
      .totals = shared.totals.data() + at,
      .sums = shared.sums.data() + at * padded_head_dim(config.head_dim),
      .output = shared.inner.data() + token * width + head * config.head_dim,
  });
}

}  // namespace firstlm
