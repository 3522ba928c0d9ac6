// Appending to the key/value cache. Letters as in ../kv.h.
#include "copy.cuh"
#include "launchers.h"
#include "span.cuh"

namespace firstlm::cuda {
namespace {

constexpr int kThreads = 128;

// The keys or the values, as units of one or more elements: only their size matters.
template <class Unit>
struct Tokens {
  Input<Unit> tokens;
  InOut<Unit> storage;
  int64_t D;                             // units of a token
  int64_t stride_R, stride_H, stride_T;  // of tokens, in units

  explicit Tokens(const NewTokens& from)
      : tokens(from.tokens, units(extent(from), from)),
        storage(from.storage, units(from.R * from.H * from.C * from.D, from)),
        D(units(from.D, from)),
        stride_R(units(from.stride_R, from)),
        stride_H(units(from.stride_H, from)),
        stride_T(units(from.stride_T, from)) {}

  static int64_t units(int64_t elements, const NewTokens& from) {
    return elements * from.element_size / static_cast<int64_t>(sizeof(Unit));
  }

  // Elements from the first to the last one.
  static int64_t extent(const NewTokens& from) {
    if (from.bytes() == 0) return 0;
    return (from.R - 1) * from.stride_R + (from.H - 1) * from.stride_H +
           (from.T - 1) * from.stride_T + from.D;
  }
};

// A block takes blockDim.y tokens of one row and head, of the keys (blockIdx.y 0) or values (1).
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    append_kernel(Tokens<Unit> keys, Tokens<Unit> values, Input<int64_t> start, int64_t H,
                  int64_t C, int64_t T) {
  const Tokens<Unit>& side = blockIdx.y == 0 ? keys : values;
  const int64_t tiles = ceil_div(T, blockDim.y);
  const int64_t row = blockIdx.x / tiles, r = row / H, h = row % H;
  const int64_t t = blockIdx.x % tiles * blockDim.y + threadIdx.y;
  const int64_t first = start.load(r);
  if (t >= T || first < 0 || first > C - T) return;
  const int64_t from = r * side.stride_R + h * side.stride_H + t * side.stride_T;
  const int64_t to = (row * C + first + t) * side.D;
  for (int64_t i = threadIdx.x; i < side.D; i += blockDim.x) {
    side.storage.store(to + i, side.tokens.load(from + i));
  }
}

Alignment& include(Alignment& alignment, const NewTokens& side) {
  const int64_t size = side.element_size;
  return alignment.address(side.tokens)
      .address(side.storage)
      .distance(side.D * size)
      .distance(side.stride_R * size)
      .distance(side.stride_H * size)
      .distance(side.stride_T * size);
}

template <class Unit>
void append(const NewTokens& keys, const NewTokens& values, const int64_t* start, void* stream) {
  const Tokens<Unit> key_units(keys), value_units(values);
  const int64_t D = larger(key_units.D, value_units.D);
  int width = 1;  // threads that share a token
  while (width < D && width < kThreads) width *= 2;
  const int height = kThreads / width;
  launch(append_kernel<Unit>, grid(keys.R * keys.H * ceil_div(keys.T, height), 2),
         dim3(width, height), stream, key_units, value_units, Input<int64_t>(start, keys.R), keys.H,
         keys.C, keys.T);
}

}  // namespace

void kv_append(const NewTokens& keys, const NewTokens& values, const int64_t* start, void* stream) {
  Alignment alignment;
  with_copy_unit(include(include(alignment, keys), values),
                 [&](auto unit) { append<decltype(unit)>(keys, values, start, stream); });
}

}  // namespace firstlm::cuda
