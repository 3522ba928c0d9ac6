#include "rows.h"

#include <algorithm>
#include <cstring>

#include "arithmetic.h"
#include "parallel.h"

namespace firstlm {
namespace {

// Rows are cut at fixed places, so that vectors and their tails fall alike for any thread count.
constexpr int64_t kBytesPerPiece = 32 * 1024;

struct Piece {
  int64_t begin, bytes;  // within a row
};

int64_t pieces_per_row(int64_t row_bytes) { return ceil_div(row_bytes, kBytesPerPiece); }

Piece piece_of_row(int64_t index, int64_t row_bytes) {
  const int64_t begin = index * kBytesPerPiece;
  return {begin, std::min(kBytesPerPiece, row_bytes - begin)};
}

// body(row, piece) for all pieces of `count` rows.
template <class Body>
void for_each_piece(int64_t count, int64_t row_bytes, int threads, const Body& body) {
  const int64_t pieces = pieces_per_row(row_bytes);
  parallel_for(count * pieces, threads_for(count * row_bytes, threads),
               [&](int64_t item) { body(item / pieces, piece_of_row(item % pieces, row_bytes)); });
}

// `to` may be `from`.
void copy(const std::byte* from, int64_t bytes, std::byte* to) {
  if (to != from) std::memcpy(to, from, bytes);
}

double gate_of(const RowUpdate& update, int64_t r, DType dtype) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(update.gate)[r]
                                  : static_cast<const float*>(update.gate)[r];
}

// `to` may be the old row itself.
void write_piece(const Kernels& kernels, const std::byte* old_row, const RowUpdate& update,
                 int64_t r, DType dtype, Piece piece, std::byte* to) {
  const std::byte* from = old_row + piece.begin;
  const std::byte* values = update.values[r] + piece.begin;
  to += piece.begin;
  const double gate = update.gate ? gate_of(update, r, dtype) : 1;
  if (gate == 1) return copy(values, piece.bytes, to);
  if (gate == 0) return copy(from, piece.bytes, to);
  kernels.lerp[static_cast<int>(dtype)](from, values, gate, piece.bytes / size_of(dtype), to);
}

}  // namespace

void plan_rows(const bool* keep_mask, int64_t B, int64_t L, int64_t* rows, int64_t* counts) {
  std::fill_n(rows, L * B, -1);
  std::fill_n(counts, L, 0);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t l = 0; l < L; ++l) {
      if (keep_mask[b * L + l]) rows[l * B + counts[l]++] = b;
    }
  }
}

int64_t invert_rows(const int64_t* rows, int64_t R, int64_t B, int64_t* update_of) {
  std::fill_n(update_of, B, -1);
  for (int64_t r = 0; r < R; ++r) {
    if (rows[r] == -1) continue;
    if (rows[r] < 0 || rows[r] >= B || update_of[rows[r]] >= 0) return r;
    update_of[rows[r]] = r;
  }
  return R;
}

void gather_rows(ConstRows hidden, const int64_t* rows, int64_t R, int64_t row_bytes, int threads,
                 Rows out) {
  for_each_piece(R, row_bytes, threads, [&](int64_t r, Piece piece) {
    std::byte* to = out[r] + piece.begin;
    if (rows[r] < 0) {
      std::memset(to, 0, piece.bytes);
    } else {
      std::memcpy(to, hidden[rows[r]] + piece.begin, piece.bytes);
    }
  });
}

void scatter_rows(const Kernels& kernels, ConstRows hidden, int64_t B, const RowUpdate& update,
                  const int64_t* update_of, RowSize size, int threads, Rows out) {
  for_each_piece(B, size.bytes, threads, [&](int64_t b, Piece piece) {
    const int64_t r = update_of[b];
    if (r < 0) {
      std::memcpy(out[b] + piece.begin, hidden[b] + piece.begin, piece.bytes);
    } else {
      write_piece(kernels, hidden[b], update, r, size.dtype, piece, out[b]);
    }
  });
}

void scatter_rows_in_place(const Kernels& kernels, Rows hidden, const RowUpdate& update,
                           RowSize size, int threads) {
  for_each_piece(update.R, size.bytes, threads, [&](int64_t r, Piece piece) {
    if (update.rows[r] < 0) return;
    std::byte* row = hidden[update.rows[r]];
    write_piece(kernels, row, update, r, size.dtype, piece, row);
  });
}

void scatter_add_rows(const Kernels& kernels, Rows hidden, const int64_t* rows, int64_t R,
                      ConstRows update, RowSize size, int threads) {
  const auto add = kernels.add[static_cast<int>(size.dtype)];
  const int64_t element_bytes = size_of(size.dtype);
  // A thread takes one piece of every row: repeated rows do not race.
  const int64_t pieces = pieces_per_row(size.bytes);
  parallel_for(pieces, threads_for(R * size.bytes, threads), [&](int64_t index) {
    const Piece piece = piece_of_row(index, size.bytes);
    for (int64_t r = 0; r < R; ++r) {
      if (rows[r] < 0) continue;
      add(update[r] + piece.begin, piece.bytes / element_bytes, hidden[rows[r]] + piece.begin);
    }
  });
}

}  // namespace firstlm
