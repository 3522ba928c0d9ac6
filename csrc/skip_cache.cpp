#include "skip_cache.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace firstlm {

// --- Tokens of a layer ------------------------------------------------------------------------

LayerBooks::LayerBooks(std::optional<int64_t> window) : window_(window) {
  if (window && *window < 1) {
    throw std::invalid_argument("sliding window is " + std::to_string(*window) +
                                "; expected 1 or more tokens, or none");
  }
}

LayerBooks LayerBooks::restored(std::optional<int64_t> window, int64_t length) {
  LayerBooks books(window);
  books.length_ = length;
  books.base_ = books.visible_start(length);
  books.capacity_ = books.visible();
  return books;
}

int64_t LayerBooks::visible_start(int64_t length) const {
  return window_ ? std::max<int64_t>(length - *window_ + 1, 0) : 0;
}

Reservation LayerBooks::reserve(int64_t num_new) const {
  constexpr int64_t kMinCapacity = 16;
  const int64_t live = visible();
  // Half as much again, so that a token is moved twice on average however many follow.
  const int64_t roomy = std::max(kMinCapacity, (live + num_new) * 3 / 2);
  const bool fits = next_slot() + num_new <= capacity_;
  // What a long prompt took goes back when the window has left most of it behind.
  const bool oversized = window_ && capacity_ > 2 * roomy;
  if (fits && !oversized) return {false, visible_slot(), live, capacity_};
  return {true, visible_slot(), live, roomy};
}

void LayerBooks::move(const Reservation& reservation) {
  if (reservation.moves) base_ += reservation.first;
  capacity_ = reservation.capacity;
}

void LayerBooks::check_crop(int64_t length) const {
  if (length < 0)
    throw std::invalid_argument("cannot crop to " + std::to_string(length) + " tokens");
  const int64_t target = std::min(length, length_), start = visible_start(target);
  if (capacity_ > 0 && start < base_ && start < target) {
    throw std::runtime_error("cannot crop to " + std::to_string(length) +
                             " tokens: the sliding window of " + std::to_string(*window_) +
                             " has dropped the tokens before " + std::to_string(base_) +
                             "; prefill again instead");
  }
}

void LayerBooks::crop(int64_t length) {
  length_ = std::min(length_, length);
  // Where nothing of what was dropped is visible: a freed layer, or a window of one token.
  base_ = std::min(base_, visible_start(length_));
}

// --- Rows -------------------------------------------------------------------------------------

namespace {

void check_count(const char* what, int64_t actual, int64_t expected) {
  if (actual == expected) return;
  throw std::invalid_argument(std::string(what) + " is for " + std::to_string(actual) +
                              " sequences; this cache has " + std::to_string(expected));
}

// Nothing if `rows` are all R rows in their order.
std::optional<std::vector<int64_t>> unless_unchanged(std::vector<int64_t> rows, int64_t R) {
  std::vector<int64_t> all(R);
  std::iota(all.begin(), all.end(), 0);
  if (rows == all) return std::nullopt;
  return rows;
}

// The rows of `layer` whose sequences keep it in `after` as well.
std::optional<std::vector<int64_t>> staying_rows(const KeepMask& before, const KeepMask& after,
                                                 int64_t layer) {
  const std::vector<int64_t> sequences = before.rows(layer);
  const auto R = static_cast<int64_t>(sequences.size());
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < R; ++r) {
    if (after.keeps(sequences[r], layer)) rows.push_back(r);
  }
  return unless_unchanged(std::move(rows), R);
}

// [B]: the row that holds each sequence's tokens, -1 for those that skip `layer`.
std::vector<int64_t> row_of_sequence(const KeepMask& mask, int64_t layer) {
  std::vector<int64_t> row(mask.B(), -1);
  const std::vector<int64_t> rows = mask.rows(layer);
  for (size_t r = 0; r < rows.size(); ++r) row[rows[r]] = static_cast<int64_t>(r);
  return row;
}

}  // namespace

KeepMask::KeepMask(int64_t B, int64_t L) : KeepMask(B, L, std::vector<uint8_t>(B * L, 1)) {}

KeepMask::KeepMask(int64_t B, int64_t L, std::vector<uint8_t> keep)
    : B_(B), L_(L), keep_(std::move(keep)) {
  if (static_cast<int64_t>(keep_.size()) != B * L) {
    throw std::invalid_argument("keep mask has " + std::to_string(keep_.size()) +
                                " elements; expected " + std::to_string(B) + " x " +
                                std::to_string(L));
  }
}

std::vector<int64_t> KeepMask::rows(int64_t layer) const {
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < B_; ++b) {
    if (keeps(b, layer)) rows.push_back(b);
  }
  return rows;
}

int64_t KeepMask::count(int64_t layer) const {
  int64_t count = 0;
  for (int64_t b = 0; b < B_; ++b) count += keeps(b, layer);
  return count;
}

RowChange restrict_layer(const KeepMask& before, int64_t layer, const std::vector<uint8_t>& keep) {
  check_count("keep", static_cast<int64_t>(keep.size()), before.B());
  std::vector<uint8_t> after = before.values();
  for (int64_t b = 0; b < before.B(); ++b) after[b * before.L() + layer] &= keep[b];
  RowChange change{KeepMask(before.B(), before.L(), std::move(after)), {}};
  change.rows.resize(before.L());
  change.rows[layer] = staying_rows(before, change.mask, layer);
  return change;
}

RowChange restrict_to(const KeepMask& before, const KeepMask& keep) {
  check_count("keep", keep.B(), before.B());
  if (keep.L() != before.L()) {
    throw std::invalid_argument("keep is for " + std::to_string(keep.L()) +
                                " layers; this cache has " + std::to_string(before.L()));
  }
  for (size_t i = 0; i < keep.values().size(); ++i) {
    if (keep.values()[i] && !before.values()[i]) {
      throw std::invalid_argument(
          "a layer that was skipped has no keys and values and cannot be kept later; prefill again "
          "(generate(replan=True)) or reset() the cache");
    }
  }
  RowChange change{keep, {}};
  for (int64_t layer = 0; layer < before.L(); ++layer) {
    change.rows.push_back(staying_rows(before, keep, layer));
  }
  return change;
}

RowChange select(const KeepMask& before, const std::vector<int64_t>& index) {
  const int64_t B = before.B(), L = before.L();
  std::vector<int64_t> source;
  for (const int64_t i : index) {
    if (i < -B || i >= B) {
      throw std::out_of_range("row indices must lie in [0, " + std::to_string(B) + "), got " +
                              std::to_string(i));
    }
    source.push_back(i < 0 ? i + B : i);
  }
  std::vector<uint8_t> after;
  for (const int64_t b : source) {
    after.insert(after.end(), before.values().begin() + b * L,
                 before.values().begin() + (b + 1) * L);
  }
  RowChange change{KeepMask(static_cast<int64_t>(source.size()), L, std::move(after)), {}};
  for (int64_t layer = 0; layer < L; ++layer) {
    const std::vector<int64_t> row = row_of_sequence(before, layer);
    std::vector<int64_t> rows;
    for (const int64_t b : source) {
      if (row[b] >= 0) rows.push_back(row[b]);
    }
    change.rows.push_back(unless_unchanged(std::move(rows), before.count(layer)));
  }
  return change;
}

std::vector<int64_t> repeated(int64_t B, int64_t repeats) {
  if (repeats < 0) {
    throw std::invalid_argument("repeats is " + std::to_string(repeats) + "; expected 0 or more");
  }
  std::vector<int64_t> index(B * repeats);
  for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int64_t>(i) / repeats;
  return index;
}

}  // namespace firstlm
