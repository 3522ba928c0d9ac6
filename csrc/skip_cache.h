// The books of a skip cache: which sequences keep which layers, and in which slots of a layer's
// storage its tokens lie. No tensors here; what follows for them is returned as plain numbers.
// Letters: B sequences, L layers, R rows that one layer holds.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace firstlm {

// How room is made for new tokens: in the storage as it is, or in a new one, to whose front the
// live tokens move. Nothing moves within a storage: a call that fails half-way has changed nothing,
// and views of what was there stay what they are.
struct Reservation {
  bool moves;        // to a new storage
  int64_t first;     // slot of the first live token before the move
  int64_t live;      // tokens that the new ones still see
  int64_t capacity;  // slots of the storage afterwards
};

// Where the tokens of one layer lie: the token at position p of the sequence is in slot p - base. A
// layer with a sliding window lets `base` follow the window whenever it runs out of slots, so its
// capacity stays within a constant of the window.
class LayerBooks {
 public:
  // `window`: number of tokens that a query sees, itself included; none = all of them.
  explicit LayerBooks(std::optional<int64_t> window = std::nullopt);

  std::optional<int64_t> window() const { return window_; }
  int64_t length() const { return length_; }  // tokens of the sequence, dropped ones included
  int64_t base() const { return base_; }
  int64_t capacity() const { return capacity_; }

  // Position of the first token that the token after `length` tokens sees.
  int64_t visible_start(int64_t length) const;
  // Tokens that the next one sees.
  int64_t visible() const { return length_ - visible_start(length_); }
  // Slot of the first token that the next one sees.
  int64_t visible_slot() const { return visible_start(length_) - base_; }

  // Slot of the next token.
  int64_t next_slot() const { return length_ - base_; }

  // How to make room for `num_new` tokens: reserve, move what it says, append.
  Reservation reserve(int64_t num_new) const;
  void move(const Reservation& reservation);
  void append(int64_t num_new) { length_ += num_new; }

  // Throws std::runtime_error if the tokens that are needed at `length` have been dropped.
  void check_crop(int64_t length) const;
  // At most `length` tokens from now on.
  void crop(int64_t length);
  // The storage is gone; the length of the sequence stays.
  void free_storage() { capacity_ = 0; }

  // Books of a storage that holds exactly the visible ones of `length` tokens.
  static LayerBooks restored(std::optional<int64_t> window, int64_t length);

 private:
  std::optional<int64_t> window_;
  int64_t length_ = 0;
  int64_t base_ = 0;
  int64_t capacity_ = 0;
};

// Which sequences keep which layers.
class KeepMask {
 public:
  KeepMask(int64_t B, int64_t L);  // all of them
  KeepMask(int64_t B, int64_t L, std::vector<uint8_t> keep);

  int64_t B() const { return B_; }
  int64_t L() const { return L_; }
  const std::vector<uint8_t>& values() const { return keep_; }  // [B, L]
  bool keeps(int64_t b, int64_t layer) const { return keep_[b * L_ + layer]; }

  // The sequences that keep `layer`, ascending: sequence rows(layer)[r] is row r of the layer.
  std::vector<int64_t> rows(int64_t layer) const;
  int64_t count(int64_t layer) const;

 private:
  int64_t B_, L_;
  std::vector<uint8_t> keep_;
};

// A new keep mask, and for every layer which of its present rows are the new ones, in order;
// nothing for layers whose rows stay as they are.
struct RowChange {
  KeepMask mask;
  std::vector<std::optional<std::vector<int64_t>>> rows;  // [L]
};

// Sequences that do not keep their layer in `keep` lose it. Throws std::invalid_argument if `keep`
// is of another shape, or keeps a layer that was skipped.
RowChange restrict_to(const KeepMask& before, const KeepMask& keep);
// Sequences b without keep[b] lose `layer`. Throws std::invalid_argument for another number of
// them.
RowChange restrict_layer(const KeepMask& before, int64_t layer, const std::vector<uint8_t>& keep);
// Sequence b is the old sequence index[b]; negative ones count from the end. Throws
// std::out_of_range.
RowChange select(const KeepMask& before, const std::vector<int64_t>& index);

// Every one of B sequences `repeats` times, side by side: an index for select. Throws
// std::invalid_argument for a negative number.
std::vector<int64_t> repeated(int64_t B, int64_t repeats);

}  // namespace firstlm
