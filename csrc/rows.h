// Masked layer execution: the rows of a batch that keep a layer are gathered, run, and scattered
// back. Letters: B sequences, L layers, R rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "dtype.h"

namespace firstlm {

// Rows of one size whose elements are contiguous, at any distance from each other.
template <class Byte>
struct RowsOf {
  Byte* data;
  int64_t stride;  // bytes; 0: every row is the same one

  Byte* operator[](int64_t row) const { return data + row * stride; }
};
using Rows = RowsOf<std::byte>;
using ConstRows = RowsOf<const std::byte>;

struct RowSize {
  DType dtype;    // read where arithmetic is done only
  int64_t bytes;  // of one row
};

// What scatter_rows writes: values[r], or the blend of the old row and values[r] by gate[r], exact
// (a copy) at 0 and 1.
struct RowUpdate {
  const int64_t* rows;  // [R], distinct; -1 is ignored
  int64_t R;
  ConstRows values;
  const void* gate;  // [R] f64 for f64 rows and f32 for all others; null: values replace rows
};

// keep_mask [B, L] contiguous -> rows [L, B]: the sequences that keep layer l, ascending, then -1;
// counts [L]: how many there are.
void plan_rows(const bool* keep_mask, int64_t B, int64_t L, int64_t* rows, int64_t* counts);

// rows [R] -> update_of [B]: the r whose rows[r] is b, -1 where there is none. Returns the first r
// that lies outside [-1, B) or names a row again, R if all are well.
int64_t invert_rows(const int64_t* rows, int64_t R, int64_t B, int64_t* update_of);

// out[r] = hidden[rows[r]], zeros where rows[r] is -1.
void gather_rows(ConstRows hidden, const int64_t* rows, int64_t R, int64_t row_bytes, int threads,
                 Rows out);

// out = hidden [B rows] with `update`; update_of [B] is what invert_rows made of its rows.
void scatter_rows(const Kernels& kernels, ConstRows hidden, int64_t B, const RowUpdate& update,
                  const int64_t* update_of, RowSize size, int threads, Rows out);

// The same in place: touches the updated rows only.
void scatter_rows_in_place(const Kernels& kernels, Rows hidden, const RowUpdate& update,
                           RowSize size, int threads);

// hidden[rows[r]] += update[r] for every r in order; rows may repeat, -1 is ignored. The result
// does not depend on the number of threads.
void scatter_add_rows(const Kernels& kernels, Rows hidden, const int64_t* rows, int64_t R,
                      ConstRows update, RowSize size, int threads);

}  // namespace firstlm
