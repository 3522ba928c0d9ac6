// Appending to the key/value cache. Letters as in ../kv.h.
#include "launchers.h"
#include "span.cuh"

namespace firstlm::cuda {
namespace {

constexpr int kThreads = 128;

// The keys or the values, as units of 16 bytes or of one element: only their size matters.
template <class Unit>
struct Tokens {
  Input<Unit> tokens;
  InOut<Unit> storage;
  int64_t D;                             // units of a token
  int64_t stride_R, stride_H, stride_T;  // of tokens, in units

  Tokens(const NewTokens& from, int64_t unit)  // elements of a unit
      : tokens(from.tokens, extent(from) / unit),
        storage(from.storage, from.R * from.H * from.C * from.D / unit),
        D(from.D / unit),
        stride_R(from.stride_R / unit),
        stride_H(from.stride_H / unit),
        stride_T(from.stride_T / unit) {}

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

bool fits(const NewTokens& side, int64_t unit) {
  return side.D % unit == 0 && side.stride_R % unit == 0 && side.stride_H % unit == 0 &&
         side.stride_T % unit == 0 && is_aligned(side.tokens) && is_aligned(side.storage);
}

template <class Unit>
void append(const NewTokens& keys, const NewTokens& values, const int64_t* start, void* stream) {
  const int64_t unit = sizeof(Unit) / keys.element_size;
  const int64_t D = larger(keys.D, values.D) / unit;
  int width = 1;  // threads that share a token
  while (width < D && width < kThreads) width *= 2;
  const int height = kThreads / width;
  launch(append_kernel<Unit>, dim3(keys.R * keys.H * ceil_div(keys.T, height), 2),
         dim3(width, height), stream, Tokens<Unit>(keys, unit), Tokens<Unit>(values, unit),
         Input<int64_t>(start, keys.R), keys.H, keys.C, keys.T);
}

struct alignas(kAccessBytes) Unit16 {
  uint64_t halves[2];
};

}  // namespace

void kv_append(const NewTokens& keys, const NewTokens& values, const int64_t* start, void* stream) {
  const int64_t unit = kAccessBytes / keys.element_size;
  if (fits(keys, unit) && fits(values, unit)) {
    append<Unit16>(keys, values, start, stream);
  } else if (keys.element_size == 2) {
    append<uint16_t>(keys, values, start, stream);
  } else if (keys.element_size == 4) {
    append<uint32_t>(keys, values, start, stream);
  } else {
    append<uint64_t>(keys, values, start, stream);
  }
}

}  // namespace firstlm::cuda
