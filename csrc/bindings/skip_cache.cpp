#include "skip_cache.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstring>
#include <map>

namespace firstlm {
namespace {

using at::Tensor;

// Storage outlives the mode it was made in: tensors of inference mode could not be written later.
struct StorageMode {
  c10::InferenceMode normal{false};
  at::NoGradGuard no_grad;
};

Tensor slots(const Tensor& storage, int64_t first, int64_t count) {
  return storage.narrow(2, first, count);
}

// The live slots of contiguous `storage`, in a new one of `capacity` slots.
Tensor moved(const Tensor& storage, const Reservation& reservation) {
  Tensor fresh = at::empty(
      {storage.size(0), storage.size(1), reservation.capacity, storage.size(3)}, storage.options());
  if (!storage.is_cpu()) {
    slots(fresh, 0, reservation.live).copy_(slots(storage, reservation.first, reservation.live));
    return fresh;
  }
  // Not by torch: its threads, once woken, spin for milliseconds against those that decode.
  const size_t slot_bytes = storage.size(3) * storage.element_size();
  const size_t bytes = reservation.live * slot_bytes;
  const int64_t heads = bytes > 0 ? storage.size(0) * storage.size(1) : 0;
  auto* to = static_cast<char*>(fresh.mutable_data_ptr());
  const auto* from = static_cast<const char*>(storage.const_data_ptr());
  from += reservation.first * slot_bytes;
  for (int64_t head = 0; head < heads; ++head) {
    std::memcpy(to, from, bytes);
    to += fresh.size(2) * slot_bytes;
    from += storage.size(2) * slot_bytes;
  }
  return fresh;
}

// Room for T more tokens at the books' next slot.
Reservation make_room(LayerStorage& held, int64_t T) {
  const Reservation reservation = held.books.reserve(T);
  if (reservation.moves) {
    held.keys = moved(held.keys, reservation);
    held.values = moved(held.values, reservation);
  }
  held.books.move(reservation);
  return reservation;
}

int64_t bytes_per_token(const Tensor& storage) {
  return storage.size(1) * storage.size(3) * storage.element_size();
}

void kv_append(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
               const Tensor& new_values, const Tensor& start) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("firstlm::kv_append", "")
          .typed<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>();
  op.call(keys, values, new_keys, new_values, start);
}

}  // namespace

SkipCacheStorage::SkipCacheStorage(const Windows& windows) {
  for (const std::optional<int64_t> window : windows) layers_.push_back({LayerBooks(window)});
}

int64_t SkipCacheStorage::B() const {
  if (mask_) return mask_->B();
  for (const LayerStorage& layer : layers_) {
    if (layer.keys.defined()) return layer.R();
  }
  return -1;
}

int64_t SkipCacheStorage::length() const {
  int64_t length = 0;
  for (const LayerStorage& layer : layers_) length = std::max(length, layer.books.length());
  return length;
}

const LayerStorage& SkipCacheStorage::layer(int64_t layer) const {
  TORCH_CHECK_INDEX(layer >= 0 && layer < L(), "layer is ", layer, "; expected [0, ", L(), ")");
  return layers_[layer];
}

// --- Tokens -----------------------------------------------------------------------------------

// Rows that `layer` has or will have; -1 if any number will do.
int64_t SkipCacheStorage::expected_rows(int64_t layer) const {
  if (mask_) return mask_->count(layer);
  return B();
}

void SkipCacheStorage::check_tokens(int64_t layer, const Tensor& new_keys,
                                    const Tensor& new_values) const {
  const LayerStorage& held = this->layer(layer);
  TORCH_CHECK(
      !at::GradMode::is_enabled() || !(new_keys.requires_grad() || new_values.requires_grad()),
      "a SkipCache keeps no autograd history: run under torch.no_grad(), or pass "
      "use_cache=False for training");
  TORCH_CHECK_VALUE(new_keys.dim() == 4, "keys have shape ", new_keys.sizes(),
                    "; expected [R, H, T, D]");
  TORCH_CHECK_VALUE(
      new_values.dim() == 4 && new_values.sizes().slice(0, 3) == new_keys.sizes().slice(0, 3),
      "values have shape ", new_values.sizes(),
      "; expected [R, H, T, D] with R, H, T of the keys, ", new_keys.sizes().slice(0, 3));
  const int64_t R = expected_rows(layer);
  TORCH_CHECK_VALUE(R < 0 || new_keys.size(0) == R, "this cache layer holds ", R, " rows, got ",
                    new_keys.size(0));
  TORCH_CHECK_VALUE(held.keys.defined() || held.books.length() == 0, "this cache layer held ",
                    held.books.length(),
                    " tokens of sequences that it no longer has; it takes no more");
  TORCH_CHECK_VALUE(new_values.device() == new_keys.device(), "values are on ", new_values.device(),
                    "; expected ", new_keys.device(), ", where the keys are");
  if (!held.keys.defined()) return;
  TORCH_CHECK_VALUE(new_keys.device() == held.keys.device(), "keys are on ", new_keys.device(),
                    "; expected ", held.keys.device(), ", where this layer's cache is");
  TORCH_CHECK_VALUE(new_keys.size(1) == held.keys.size(1) &&
                        new_keys.size(3) == held.keys.size(3) &&
                        new_values.size(3) == held.values.size(3),
                    "keys and values have ", new_keys.size(1), " heads of ", new_keys.size(3),
                    " and ", new_values.size(3), "; this cache layer holds ", held.keys.size(1),
                    " of ", held.keys.size(3), " and ", held.values.size(3));
}

// The layer's storage, or one without slots for tokens like these.
LayerStorage SkipCacheStorage::started(int64_t layer, const Tensor& new_keys,
                                       const Tensor& new_values) const {
  check_tokens(layer, new_keys, new_values);
  LayerStorage held = layers_[layer];
  if (held.keys.defined()) return held;
  const StorageMode mode;
  const int64_t R = new_keys.size(0), H = new_keys.size(1);
  held.keys = at::empty({R, H, 0, new_keys.size(3)}, new_keys.options());
  held.values = at::empty({R, H, 0, new_values.size(3)}, new_values.options());
  held.bytes_per_token = bytes_per_token(held.keys) + bytes_per_token(held.values);
  return held;
}

void SkipCacheStorage::initialize(int64_t layer, const Tensor& new_keys, const Tensor& new_values) {
  layers_[layer] = started(layer, new_keys, new_values);
}

// `slot` as a tensor where `like` is. Filled by a kernel, so that no device is waited for.
Tensor SkipCacheStorage::slot_on(const Tensor& like, int64_t slot) {
  if (!slot_.defined() || slot_value_ != slot || slot_.device() != like.device()) {
    slot_ = at::full({1}, slot, like.options().dtype(at::kLong));
    slot_value_ = slot;
  }
  return slot_;
}

SkipCacheStorage::Views SkipCacheStorage::append(int64_t layer, const Tensor& new_keys,
                                                 const Tensor& new_values) {
  LayerStorage held = started(layer, new_keys, new_values);
  const StorageMode mode;
  const int64_t T = new_keys.size(2);
  const Tensor keys = new_keys.to(held.keys.scalar_type());
  const Tensor values = new_values.to(held.values.scalar_type());
  const Reservation reservation = make_room(held, T);
  const int64_t seen_from = held.books.visible_slot();
  kv_append(held.keys, held.values, keys, values, slot_on(held.keys, held.books.next_slot()));
  held.books.append(T);
  const int64_t seen = reservation.live + T;
  Views views{slots(held.keys, seen_from, seen), slots(held.values, seen_from, seen)};
  layers_[layer] = std::move(held);
  return views;
}

const LayerStorage& SkipCacheStorage::reserve(int64_t layer, int64_t R, int64_t H, int64_t T,
                                              int64_t D, at::ScalarType dtype) {
  const StorageMode mode;
  LayerStorage held = this->layer(layer);
  if (!held.keys.defined()) {
    held.keys = at::empty({R, H, 0, D}, dtype);
    held.values = at::empty({R, H, 0, D}, dtype);
    held.bytes_per_token = bytes_per_token(held.keys) + bytes_per_token(held.values);
  }
  make_room(held, T);
  layers_[layer] = std::move(held);
  return layers_[layer];
}

void SkipCacheStorage::advance(int64_t layer, int64_t T) { layers_[layer].books.append(T); }

SkipCacheStorage::Views SkipCacheStorage::visible(int64_t layer) const {
  const LayerStorage& held = this->layer(layer);
  if (!held.keys.defined()) return {};
  const int64_t first = held.books.visible_slot(), count = held.books.visible();
  return {slots(held.keys, first, count), slots(held.values, first, count)};
}

void SkipCacheStorage::crop(int64_t length) {
  for (const LayerStorage& layer : layers_) layer.books.check_crop(length);
  for (LayerStorage& layer : layers_) layer.books.crop(length);
}

void SkipCacheStorage::reset() {
  for (LayerStorage& layer : layers_) layer = {LayerBooks(layer.books.window())};
  mask_.reset();
  slot_.reset();
}

// --- Rows -------------------------------------------------------------------------------------

// The mask, or the one of a cache of B sequences about which nothing was decided yet.
KeepMask SkipCacheStorage::mask_for(int64_t B) const {
  return mask_ ? *mask_ : KeepMask(this->B() < 0 ? B : this->B(), L());
}

void SkipCacheStorage::restrict_to(const KeepMask& keep) {
  apply(firstlm::restrict_to(mask_for(keep.B()), keep));
}

void SkipCacheStorage::restrict_layer(int64_t layer, const std::vector<uint8_t>& keep) {
  this->layer(layer);
  apply(firstlm::restrict_layer(mask_for(static_cast<int64_t>(keep.size())), layer, keep));
}

void SkipCacheStorage::select(const std::vector<int64_t>& index) {
  if (B() >= 0) apply(firstlm::select(mask_for(B()), index));
}

void SkipCacheStorage::repeat(int64_t repeats) {
  select(repeated(std::max<int64_t>(B(), 0), repeats));
}

void SkipCacheStorage::apply(RowChange change) {
  const StorageMode mode;
  // Layers of one device share the indices that they have in common.
  std::map<std::pair<std::string, std::vector<int64_t>>, Tensor> indices;
  std::vector<LayerStorage> layers = layers_;
  for (int64_t l = 0; l < L(); ++l) {
    const auto& rows = change.rows[l];
    LayerStorage& held = layers[l];
    if (!rows || !held.keys.defined()) continue;
    if (rows->empty()) {
      held.keys.reset();
      held.values.reset();
      held.books.free_storage();
      continue;
    }
    Tensor& index = indices[{held.keys.device().str(), *rows}];
    if (!index.defined()) index = at::tensor(*rows, at::kLong).to(held.keys.device());
    held.keys = held.keys.index_select(0, index);
    held.values = held.values.index_select(0, index);
  }
  layers_ = std::move(layers);
  mask_ = std::move(change.mask);
}

// --- Books ------------------------------------------------------------------------------------

MemoryUse SkipCacheStorage::memory() const {
  MemoryUse use;
  int64_t any_known = 0;
  for (const LayerStorage& layer : layers_) {
    if (any_known == 0) any_known = layer.bytes_per_token;
  }
  const int64_t tokens = length();
  for (const LayerStorage& layer : layers_) {
    use.visible += layer.R() * layer.books.visible() * layer.bytes_per_token;
    use.allocated += layer.R() * layer.books.capacity() * layer.bytes_per_token;
    const int64_t size = layer.bytes_per_token ? layer.bytes_per_token : any_known;
    use.full += size * (tokens - layer.books.visible_start(tokens));
  }
  use.full *= std::max<int64_t>(B(), 0);
  return use;
}

std::vector<SkipCacheStorage::SavedLayer> SkipCacheStorage::saved() const {
  const StorageMode mode;
  std::vector<SavedLayer> saved;
  for (int64_t l = 0; l < L(); ++l) {
    const auto [keys, values] = visible(l);
    SavedLayer layer{layers_[l].books.length(), layers_[l].bytes_per_token, {}, {}};
    if (keys.defined()) {
      layer.keys = keys.clone(at::MemoryFormat::Contiguous);
      layer.values = values.clone(at::MemoryFormat::Contiguous);
    }
    saved.push_back(std::move(layer));
  }
  return saved;
}

SkipCacheStorage SkipCacheStorage::restored(const Windows& windows, std::optional<KeepMask> mask,
                                            const std::vector<SavedLayer>& layers) {
  SkipCacheStorage cache(windows);
  TORCH_CHECK_VALUE(layers.size() == windows.size() && (!mask || mask->L() == cache.L()),
                    "a state of ", layers.size(), " layers does not fit a cache of ", cache.L());
  cache.mask_ = std::move(mask);
  for (size_t l = 0; l < layers.size(); ++l) {
    const SavedLayer& saved = layers[l];
    LayerStorage& held = cache.layers_[l];
    held.books = LayerBooks::restored(windows[l], saved.length);
    held.bytes_per_token = saved.bytes_per_token;
    if (saved.keys && saved.values) {
      held.keys = saved.keys->contiguous();
      held.values = saved.values->contiguous();
      TORCH_CHECK_VALUE(held.keys.dim() == 4 && held.keys.size(2) == held.books.capacity(),
                        "keys of layer ", l, " have shape ", held.keys.sizes(),
                        "; expected [R, H, ", held.books.capacity(), ", D]");
    } else {
      held.books.free_storage();
    }
  }
  return cache;
}

}  // namespace firstlm
