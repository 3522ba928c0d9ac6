// The books of a skip cache against storages and rows that are simply written out.
#include <algorithm>
#include <random>
#include <stdexcept>
#include <vector>

#include "catch.h"
#include "skip_cache.h"

namespace firstlm {
namespace {

// A storage of one row whose slots hold the positions of tokens; -1 where nothing was written.
struct Storage {
  std::vector<int64_t> slots;

  void append(LayerBooks& books, int64_t num_new) {
    const Reservation r = books.reserve(num_new);
    if (r.moves) {
      REQUIRE(r.first + r.live <= static_cast<int64_t>(slots.size()));
      std::vector<int64_t> fresh(r.capacity, -1);
      std::copy_n(slots.begin() + r.first, r.live, fresh.begin());
      slots = fresh;
    }
    books.move(r);
    REQUIRE(books.capacity() == static_cast<int64_t>(slots.size()));
    REQUIRE(books.next_slot() + num_new <= books.capacity());
    for (int64_t t = 0; t < num_new; ++t) slots[books.next_slot() + t] = books.length() + t;
    books.append(num_new);
  }

  void check(const LayerBooks& books) const {
    const int64_t start = books.visible_start(books.length());
    int wrong = 0;
    for (int64_t i = 0; i < books.visible(); ++i) {
      wrong += slots[books.visible_slot() + i] != start + i;
    }
    CHECK(wrong == 0);
  }
};

TEST_CASE("what the next token sees is always in its slots, however tokens come and go") {
  std::mt19937 random(1);
  const auto below = [&](int64_t n) {
    return std::uniform_int_distribution<int64_t>(0, n - 1)(random);
  };
  for (const int64_t window : {0, 1, 2, 7, 40}) {
    for (int run = 0; run < 20; ++run) {
      LayerBooks books = window ? LayerBooks(window) : LayerBooks();
      Storage storage;
      for (int step = 0; step < 60; ++step) {
        INFO("window " << window << ", run " << run << ", step " << step);
        if (below(4) == 0) {
          const int64_t length = books.length() - std::min(books.length(), below(12));
          try {
            books.check_crop(length);
          } catch (const std::runtime_error&) {
            CHECK(window > 1);
            continue;
          }
          books.crop(length);
        } else {
          storage.append(books, below(3) ? 1 : below(30));
        }
        storage.check(books);
      }
    }
  }
}

TEST_CASE("there is no negative length") {
  CHECK_THROWS_AS(LayerBooks().check_crop(-1), std::invalid_argument);
}

TEST_CASE("capacity grows geometrically, and a window bounds it") {
  for (const int64_t window : {0, 8, 100}) {
    LayerBooks books = window ? LayerBooks(window) : LayerBooks();
    int64_t tokens_moved = 0;
    for (int token = 0; token < 5000; ++token) {
      const Reservation r = books.reserve(1);
      if (r.moves) tokens_moved += r.live;
      books.move(r);
      books.append(1);
      CHECK(books.capacity() <= std::max<int64_t>(16, (window ? window : books.length()) * 2));
    }
    CHECK(tokens_moved <= 5000 * 3);
  }
}

TEST_CASE("a storage that a long prompt made too large is replaced by a smaller one") {
  LayerBooks books(8);
  books.move(books.reserve(1000));
  books.append(1000);
  CHECK(books.capacity() == 1500);
  books.move(books.reserve(1));
  books.append(1);
  CHECK(books.capacity() == 16);
  CHECK(books.visible() == 7);
  LayerBooks unbounded;
  unbounded.move(unbounded.reserve(1000));
  unbounded.append(1000);
  CHECK_FALSE(unbounded.reserve(1).moves);
}

TEST_CASE("restored books hold exactly what is visible") {
  for (const int64_t window : {1, 5}) {
    const LayerBooks books = LayerBooks::restored(window, 12);
    CHECK(books.length() == 12);
    CHECK(books.visible() == window - 1);
    CHECK(books.capacity() == window - 1);
    CHECK(books.visible_slot() == 0);
  }
  CHECK(LayerBooks::restored(std::nullopt, 12).capacity() == 12);
}

TEST_CASE("a window of no tokens is refused") {
  CHECK_THROWS_AS(LayerBooks(0), std::invalid_argument);
}

// Rows of a layer as the sequences that they stand for.
std::vector<int64_t> applied(const std::vector<int64_t>& held, const RowChange& change,
                             int64_t layer) {
  if (!change.rows[layer]) return held;
  std::vector<int64_t> rows;
  for (const int64_t r : *change.rows[layer]) rows.push_back(held.at(r));
  return rows;
}

KeepMask random_mask(std::mt19937& random, int64_t B, int64_t L) {
  std::vector<uint8_t> keep(B * L);
  for (uint8_t& k : keep) k = std::bernoulli_distribution(.6)(random);
  return {B, L, keep};
}

TEST_CASE("rows of every layer follow their sequences through selections") {
  std::mt19937 random(2);
  for (int run = 0; run < 200; ++run) {
    const int64_t B = run % 6, L = 4, count = run % 7;
    const KeepMask before = random_mask(random, B, L);
    std::vector<int64_t> index;
    for (int64_t i = 0; B && i < count; ++i) {
      index.push_back(std::uniform_int_distribution<int64_t>(-B, B - 1)(random));
    }
    const RowChange change = select(before, index);
    REQUIRE(change.mask.B() == static_cast<int64_t>(index.size()));
    for (int64_t layer = 0; layer < L; ++layer) {
      std::vector<int64_t> expected;
      for (const int64_t i : index) {
        const int64_t b = i < 0 ? i + B : i;
        if (before.keeps(b, layer)) expected.push_back(b);
      }
      CHECK(applied(before.rows(layer), change, layer) == expected);
      CHECK(change.mask.count(layer) == static_cast<int64_t>(expected.size()));
    }
  }
}

TEST_CASE("selecting every sequence in its place moves nothing") {
  std::mt19937 random(3);
  const KeepMask mask = random_mask(random, 5, 3);
  const RowChange change = select(mask, {0, 1, 2, 3, -1});
  CHECK(change.mask.values() == mask.values());
  for (const auto& rows : change.rows) CHECK(!rows);
}

TEST_CASE("restricting a layer frees the rows of the sequences that lose it") {
  const KeepMask mask(4, 2, {1, 1, 0, 1, 1, 1, 1, 0});
  const RowChange change = restrict_layer(mask, 0, {1, 1, 0, 1});
  CHECK(change.mask.values() == std::vector<uint8_t>{1, 1, 0, 1, 0, 1, 1, 0});
  CHECK(*change.rows[0] == std::vector<int64_t>{0, 2});  // of sequences 0, 2, 3
  CHECK(!change.rows[1]);
  const RowChange all = restrict_to(mask, change.mask);
  CHECK(all.mask.values() == change.mask.values());
  CHECK(all.rows == change.rows);
}

TEST_CASE("what does not fit is refused") {
  const KeepMask mask(2, 2, {1, 0, 1, 1});
  CHECK_THROWS_AS(restrict_to(mask, KeepMask(2, 2)), std::invalid_argument);
  CHECK_THROWS_AS(restrict_to(mask, KeepMask(1, 2, {1, 0})), std::invalid_argument);
  CHECK_THROWS_AS(restrict_to(mask, KeepMask(2, 1)), std::invalid_argument);
  CHECK_THROWS_AS(restrict_layer(mask, 0, {1}), std::invalid_argument);
  CHECK_THROWS_AS(select(mask, {0, 2}), std::out_of_range);
  CHECK_THROWS_AS(select(mask, {-3}), std::out_of_range);
  CHECK_THROWS_AS(repeated(2, -1), std::invalid_argument);
  CHECK_THROWS_AS(KeepMask(2, 2, {1}), std::invalid_argument);
}

TEST_CASE("repeats stand side by side") {
  CHECK(repeated(2, 3) == std::vector<int64_t>{0, 0, 0, 1, 1, 1});
  CHECK(repeated(3, 0).empty());
  CHECK(repeated(0, 2).empty());
}

}  // namespace
}  // namespace firstlm
