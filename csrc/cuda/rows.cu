// Masked layer execution. Letters as in ../rows.h.
#include <type_traits>

#include "compact.cuh"
#include "copy.cuh"
#include "element.cuh"
#include "launchers.h"
#include "span.cuh"
#include "warp.cuh"

namespace firstlm::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPacksPerThread = 4;

// Rows of `size` elements, at any distance from each other; T may be a unit of several elements.
template <class Span>
struct RowSpan {
  Span data;
  int64_t stride, size;  // elements
};

// The piece of one row that a block works on; pieces of a row follow one another in blockIdx.x.
struct Piece {
  int64_t row, begin;
};

template <int kPack>
__host__ __device__ int64_t pieces_per_row(int64_t size) {
  return ceil_div(size, int64_t{kThreads} * kPacksPerThread * kPack);
}

template <int kPack>
__device__ Piece piece_of_block(int64_t size) {
  const int64_t pieces = pieces_per_row<kPack>(size);
  return {blockIdx.x / pieces, blockIdx.x % pieces * kThreads * kPacksPerThread * kPack};
}

// body(i) for the packs i … i + kPack - 1 of this thread.
template <int kPack, class Body>
__device__ void for_each_pack(int64_t begin, int64_t size, const Body& body) {
#pragma unroll
  for (int step = 0; step < kPacksPerThread; ++step) {
    const int64_t i = begin + (int64_t{step} * kThreads + threadIdx.x) * kPack;
    if (i < size) body(i);
  }
}

// The first r < R whose rows[r] is `row`, -1 if there is none. All lanes of the warp must call it.
__device__ int64_t find_row(const Input<int64_t>& rows, int64_t R, int64_t row) {
  for (int64_t begin = 0; begin < R; begin += kWarpSize) {
    const int64_t r = begin + threadIdx.x % kWarpSize;
    const unsigned found = __ballot_sync(kAllLanes, r < R && rows.load(r) == row);
    if (found) return begin + __ffs(found) - 1;
  }
  return -1;
}

template <class Unit>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(RowSpan<Input<Unit>> hidden, int64_t B, Input<int64_t> rows, Output<Unit> out) {
  const int64_t size = hidden.size;
  const Piece piece = piece_of_block<1>(size);
  const int64_t row = rows.load(piece.row);
  const bool is_named = row >= 0 && row < B;
  for_each_pack<1>(piece.begin, size, [&](int64_t i) {
    out.store(piece.row * size + i, is_named ? hidden.data.load(row * hidden.stride + i) : Unit{});
  });
}

// What replaces a row: values, or their blend with the old row by a gate in (0, 1).
template <class T, int kPack>
struct Blend {
  RowSpan<Input<T>> values;
  Input<Accumulator<T>> gate;

  __device__ Accumulator<T> weight(int64_t r) const { return gate.load(r); }

  template <class Old>
  __device__ Pack<T, kPack> pack(const Old& old, int64_t old_at, int64_t r, int64_t i) const {
    const Accumulator<T> g = weight(r);
    Pack<T, kPack> pack = values.data.template load_pack<kPack>(r * values.stride + i);
    if (g == 1) return pack;
    const Pack<T, kPack> from = old.template load_pack<kPack>(old_at);
    for (int e = 0; e < kPack; ++e) {
      const Accumulator<T> a = to_accumulator(from.values[e]), b = to_accumulator(pack.values[e]);
      // As torch.lerp: from the nearer end.
      const bool is_near = g < Accumulator<T>(0.5);
      pack.values[e] = from_accumulator<T>(is_near ? a + g * (b - a) : b - (1 - g) * (b - a));
    }
    return pack;
  }
};

template <class Unit>
struct Replacement {
  RowSpan<Input<Unit>> values;

  __device__ int weight(int64_t) const { return 1; }

  template <class Old>
  __device__ Pack<Unit, 1> pack(const Old&, int64_t, int64_t r, int64_t i) const {
    return values.data.template load_pack<1>(r * values.stride + i);
  }
};

// Every row of the batch, with its update where it has one.
template <class T, int kPack, class Update>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(RowSpan<Input<T>> hidden, Input<int64_t> rows, int64_t R, Update update,
                   Output<T> out) {
  const int64_t size = hidden.size;
  const Piece piece = piece_of_block<kPack>(size);
  const int64_t b = piece.row, r = find_row(rows, R, b);
  const bool is_updated = r >= 0 && update.weight(r) != 0;
  for_each_pack<kPack>(piece.begin, size, [&](int64_t i) {
    const int64_t at = b * hidden.stride + i;
    out.store_pack(b * size + i, is_updated ? update.pack(hidden.data, at, r, i)
                                            : hidden.data.template load_pack<kPack>(at));
  });
}

// The updated rows only.
template <class T, int kPack, class Update>
__global__ void __launch_bounds__(kThreads)
    scatter_in_place_kernel(RowSpan<InOut<T>> hidden, int64_t B, Input<int64_t> rows,
                            Update update) {
  const Piece piece = piece_of_block<kPack>(hidden.size);
  const int64_t r = piece.row, row = rows.load(r);
  if (row < 0 || row >= B || update.weight(r) == 0) return;
  for_each_pack<kPack>(piece.begin, hidden.size, [&](int64_t i) {
    const int64_t at = row * hidden.stride + i;
    hidden.data.store_pack(at, update.pack(hidden.data, at, r, i));
  });
}

// The first block that names a row adds all of its updates, in their order: no two blocks write the
// same row, and the sum does not depend on who comes first.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads)
    scatter_add_kernel(RowSpan<InOut<T>> hidden, int64_t B, Input<int64_t> rows, int64_t R,
                       RowSpan<Input<T>> update) {
  const Piece piece = piece_of_block<kPack>(hidden.size);
  const int64_t first = piece.row, row = rows.load(first);
  if (row < 0 || row >= B || find_row(rows, first, row) >= 0) return;
  for_each_pack<kPack>(piece.begin, hidden.size, [&](int64_t i) {
    const int64_t at = row * hidden.stride + i;
    Pack<T, kPack> pack = hidden.data.template load_pack<kPack>(at);
    Accumulator<T> sums[kPack];
    for (int e = 0; e < kPack; ++e) sums[e] = to_accumulator(pack.values[e]);
    for (int64_t r = first; r < R; ++r) {
      if (rows.load(r) != row) continue;
      const Pack<T, kPack> more = update.data.template load_pack<kPack>(r * update.stride + i);
      for (int e = 0; e < kPack; ++e) sums[e] += to_accumulator(more.values[e]);
    }
    for (int e = 0; e < kPack; ++e) pack.values[e] = from_accumulator<T>(sums[e]);
    hidden.data.store_pack(at, pack);
  });
}

// --- Launchers
// ------------------------------------------------------------------------------------

// `count` rows of `bytes` as elements T, which all distances are multiples of.
template <class Span, class T, class Byte>
RowSpan<Span> row_span(RowsOf<Byte> rows, int64_t count, int64_t bytes) {
  const int64_t stride = rows.stride / static_cast<int64_t>(sizeof(T));
  const int64_t size = bytes / static_cast<int64_t>(sizeof(T));
  return {Span(rows.data, count == 0 || size == 0 ? 0 : (count - 1) * stride + size), stride, size};
}

template <class T>
RowSpan<Input<T>> input_rows(ConstRows rows, int64_t count, int64_t bytes) {
  return row_span<Input<T>, T>(rows, count, bytes);
}

template <class T>
RowSpan<InOut<T>> in_out_rows(Rows rows, int64_t count, int64_t bytes) {
  return row_span<InOut<T>, T>(rows, count, bytes);
}

template <int kPack>
dim3 grid_of(int64_t rows, int64_t size) {
  return grid(rows * pieces_per_row<kPack>(size));
}

template <class Byte>
Alignment& include(Alignment& alignment, RowsOf<Byte> rows) {
  return alignment.address(rows.data).distance(rows.stride);
}

// Of rows of that many bytes each.
template <class... Bytes>
Alignment alignment_of(int64_t row_bytes, RowsOf<Bytes>... rows) {
  Alignment alignment;
  alignment.distance(row_bytes);
  (include(alignment, rows), ...);
  return alignment;
}

// Calls body(element, pack) with an element of `dtype` and how many of them one access takes, as an
// integral constant.
template <class Body>
void with_element_pack(DType dtype, const Alignment& alignment, const Body& body) {
  with_element_type(dtype, [&](auto element) {
    if (alignment.fits_packs()) {
      body(element, std::integral_constant<int, kMaxPack<decltype(element)>>());
    } else {
      body(element, std::integral_constant<int, 1>());
    }
  });
}

// Calls body(element, pack, update), which a gate makes a Blend of floats and no gate a Replacement
// of whatever is copied fastest.
template <class Body>
void with_update(const RowUpdate& update, RowSize size, const Alignment& alignment,
                 const Body& body) {
  if (!update.gate) {
    return with_copy_unit(alignment, [&](auto unit) {
      using Unit = decltype(unit);
      body(unit, std::integral_constant<int, 1>(),
           Replacement<Unit>{input_rows<Unit>(update.values, update.R, size.bytes)});
    });
  }
  with_element_pack(size.dtype, alignment, [&](auto element, auto pack) {
    using T = decltype(element);
    body(element, pack,
         Blend<T, decltype(pack)::value>{input_rows<T>(update.values, update.R, size.bytes),
                                         Input<Accumulator<T>>(update.gate, update.R)});
  });
}

}  // namespace

void plan_rows(const bool* keep_mask, int64_t B, int64_t L, int64_t* rows, int64_t* counts,
               void* stream) {
  compact<int64_t, int64_t, false>({{keep_mask, B * L}, B, 1, L}, L, rows, counts, stream);
}

void gather_rows(ConstRows hidden, int64_t B, const int64_t* rows, int64_t R, int64_t row_bytes,
                 void* out, void* stream) {
  const Rows written{static_cast<std::byte*>(out), row_bytes};
  with_copy_unit(alignment_of(row_bytes, hidden, written), [&](auto unit) {
    using Unit = decltype(unit);
    const auto from = input_rows<Unit>(hidden, B, row_bytes);
    launch(gather_kernel<Unit>, grid_of<1>(R, from.size), kThreads, stream, from, B,
           Input<int64_t>(rows, R), Output<Unit>(out, R * from.size));
  });
}

void scatter_rows(ConstRows hidden, int64_t B, const RowUpdate& update, RowSize size, void* out,
                  void* stream) {
  const Rows written{static_cast<std::byte*>(out), size.bytes};
  const Alignment alignment = alignment_of(size.bytes, hidden, update.values, written);
  with_update(update, size, alignment, [&](auto element, auto pack, auto row_update) {
    using T = decltype(element);
    constexpr int kPack = decltype(pack)::value;
    const auto from = input_rows<T>(hidden, B, size.bytes);
    launch(scatter_kernel<T, kPack, decltype(row_update)>, grid_of<kPack>(B, from.size), kThreads,
           stream, from, Input<int64_t>(update.rows, update.R), update.R, row_update,
           Output<T>(out, B * from.size));
  });
}

void scatter_rows_in_place(Rows hidden, int64_t B, const RowUpdate& update, RowSize size,
                           void* stream) {
  const Alignment alignment = alignment_of(size.bytes, hidden, update.values);
  with_update(update, size, alignment, [&](auto element, auto pack, auto row_update) {
    using T = decltype(element);
    constexpr int kPack = decltype(pack)::value;
    const auto batch = in_out_rows<T>(hidden, B, size.bytes);
    launch(scatter_in_place_kernel<T, kPack, decltype(row_update)>,
           grid_of<kPack>(update.R, batch.size), kThreads, stream, batch, B,
           Input<int64_t>(update.rows, update.R), row_update);
  });
}

void scatter_add_rows(Rows hidden, int64_t B, const int64_t* rows, int64_t R, ConstRows update,
                      RowSize size, void* stream) {
  const Alignment alignment = alignment_of(size.bytes, hidden, update);
  with_element_pack(size.dtype, alignment, [&](auto element, auto pack) {
    using T = decltype(element);
    constexpr int kPack = decltype(pack)::value;
    const auto batch = in_out_rows<T>(hidden, B, size.bytes);
    launch(scatter_add_kernel<T, kPack>, grid_of<kPack>(R, batch.size), kThreads, stream, batch, B,
           Input<int64_t>(rows, R), R, input_rows<T>(update, R, size.bytes));
  });
}

}  // namespace firstlm::cuda
