// Storage of a skip cache: torch tensors of any device, moved as the books of the core say.
// Letters: B sequences, L layers, R rows that one layer holds, H key/value heads, C slots, T
// tokens, D head_dim. Every call that throws leaves the cache as it was.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../skip_cache.h"

namespace firstlm {

struct LayerStorage {
  LayerBooks books;
  at::Tensor keys{};    // [R, H, C, D]; undefined before the first token and once no row is left
  at::Tensor values{};  // [R, H, C, D'], D' may differ from D
  int64_t bytes_per_token = 0;  // of one row, 0 while unknown

  int64_t R() const { return keys.defined() ? keys.size(0) : 0; }
};

struct MemoryUse {
  int64_t visible = 0;    // bytes of the tokens that the next one sees, of kept pairs
  int64_t allocated = 0;  // bytes of the storage, spare slots included
  int64_t full = 0;       // bytes that `visible` would be if every sequence kept every layer
};

class SkipCacheStorage {
 public:
  using Views = std::pair<at::Tensor, at::Tensor>;  // keys and values, [R, H, T, D]
  using Windows = std::vector<std::optional<int64_t>>;

  // `windows`: the sliding window of each of the L layers.
  explicit SkipCacheStorage(const Windows& windows);
  SkipCacheStorage(SkipCacheStorage&&) = default;  // a copy would write into the same tensors

  int64_t L() const { return static_cast<int64_t>(layers_.size()); }
  int64_t B() const;       // -1 before the first pass
  int64_t length() const;  // of the sequences, one number whatever the layers hold
  const std::optional<KeepMask>& mask() const { return mask_; }  // none before the first decision
  const LayerStorage& layer(int64_t layer) const;                // IndexError

  // Adopts rows, heads, head_dim, dtype and device of the first tokens.
  void initialize(int64_t layer, const at::Tensor& new_keys, const at::Tensor& new_values);
  // Appends [R, H, T, D] to one layer. Returns views of what these T queries may see; they are
  // valid until the next call that changes the layer.
  Views append(int64_t layer, const at::Tensor& new_keys, const at::Tensor& new_values);
  // For a writer of its own, the engine: room for T tokens of [R, H, T, D] in a layer, in which
  // they go to `next_slot` of the books, and then the word that they are there.
  const LayerStorage& reserve(int64_t layer, int64_t R, int64_t H, int64_t T, int64_t D,
                              at::ScalarType dtype);
  void advance(int64_t layer, int64_t T);
  // Views of what the next token sees; undefined tensors where nothing is held.
  Views visible(int64_t layer) const;

  void restrict_to(const KeepMask& keep);
  void restrict_layer(int64_t layer, const std::vector<uint8_t>& keep);
  void select(const std::vector<int64_t>& index);
  void repeat(int64_t repeats);
  // At most `length` tokens from now on; RuntimeError if a sliding layer has dropped what is
  // needed.
  void crop(int64_t length);
  void reset();

  MemoryUse memory() const;

  // What a copy elsewhere needs, without the spare slots; `restored` makes a cache of it.
  struct SavedLayer {
    int64_t length;
    int64_t bytes_per_token;
    std::optional<at::Tensor> keys, values;  // [R, H, visible, D]
  };
  std::vector<SavedLayer> saved() const;
  static SkipCacheStorage restored(const Windows& windows, std::optional<KeepMask> mask,
                                   const std::vector<SavedLayer>& layers);

 private:
  int64_t expected_rows(int64_t layer) const;
  void check_tokens(int64_t layer, const at::Tensor& new_keys, const at::Tensor& new_values) const;
  LayerStorage started(int64_t layer, const at::Tensor& new_keys,
                       const at::Tensor& new_values) const;
  at::Tensor slot_on(const at::Tensor& like, int64_t slot);
  KeepMask mask_for(int64_t B) const;
  void apply(RowChange change);

  std::vector<LayerStorage> layers_;
  std::optional<KeepMask> mask_;
  at::Tensor slot_;  // [1] int64, the last one that was needed: the same for all layers of a pass
  int64_t slot_value_ = -1;
};

}  // namespace firstlm
