// The bodies of the kernels, written once over F32 and F64 of a vec_*.h. Each isa_*.cpp includes
// this file inside an anonymous namespace. Nothing of std is used here: an instantiation compiled
// for AVX-512 could be the one that the linker keeps for everybody.

#include "vec_math-inl.h"

template <int kCount, class T>
void add_row_group(const void* const* rows, int64_t width, RowsAhead ahead, Accumulator<T>* sums) {
  using Vec = typename VecOf<T>::type;
  constexpr int64_t kLine = 64;  // bytes
  constexpr int kLineElements = kLine / sizeof(T);
  const T* row[kCount];
  const char* next[kCount];
  for (int r = 0; r < kCount; ++r) {
    row[r] = static_cast<const T*>(rows[r]);
    const void* first = ahead.in_sequence ? rows[0] : rows[r];
    next[r] = static_cast<const char*>(first) + ahead.bytes + (ahead.in_sequence ? r * kLine : 0);
  }
  const int64_t step = ahead.in_sequence ? kCount * kLine : kLine;
  constexpr int kVectors = kLineElements / Vec::kLanes;  // of a line, which is fetched as a whole
  int64_t i = 0;
  const auto add_vector = [&](int64_t at) {
    Vec sum = Vec::load(sums + at);
    for (int r = 0; r < kCount; ++r) sum = sum + Vec::load(row[r] + at);
    sum.store(sums + at);
  };
  for (; i + kLineElements <= width; i += kLineElements) {
    for (int r = 0; r < kCount; ++r) {
      prefetch(next[r]);
      next[r] += step;
    }
    for (int v = 0; v < kVectors; ++v) add_vector(i + v * Vec::kLanes);
  }
  for (; i + Vec::kLanes <= width; i += Vec::kLanes) add_vector(i);
  for (; i < width; ++i) {
    for (int r = 0; r < kCount; ++r) sums[i] += widen(row[r][i]);
  }
}

template <class T>
void add_rows(const void* const* rows, int count, int64_t width, RowsAhead ahead, void* sums) {
  static_assert(kRowsPerPass == 4);
  auto* out = static_cast<Accumulator<T>*>(sums);
  switch (count) {
    case 1:
      return add_row_group<1, T>(rows, width, ahead, out);
    case 2:
      return add_row_group<2, T>(rows, width, ahead, out);
    case 3:
      return add_row_group<3, T>(rows, width, ahead, out);
    case 4:
      return add_row_group<4, T>(rows, width, ahead, out);
  }
}

template <class T>
void lerp(const void* a, const void* b, double gate, int64_t n, void* to) {
  using Vec = typename VecOf<T>::type;
  const bool near_a = gate < 0.5;
  const auto scale = static_cast<Accumulator<T>>(near_a ? gate : gate - 1);
  const auto* x = static_cast<const T*>(a);
  const auto* y = static_cast<const T*>(b);
  const T* base = near_a ? x : y;
  auto* out = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) {
    const Vec difference = Vec::load(y + i) - Vec::load(x + i);
    Vec::fma(Vec::broadcast(scale), difference, Vec::load(base + i)).store(out + i);
  }
  for (; i < n; ++i) narrow(widen(base[i]) + scale * (widen(y[i]) - widen(x[i])), out + i);
}

template <class T>
void add(const void* from, int64_t n, void* to) {
  using Vec = typename VecOf<T>::type;
  const auto* x = static_cast<const T*>(from);
  auto* sum = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) {
    (Vec::load(sum + i) + Vec::load(x + i)).store(sum + i);
  }
  for (; i < n; ++i) narrow(widen(sum[i]) + widen(x[i]), sum + i);
}

template <class T>
T dot(const T* a, const T* b, int64_t n) {
  using Vec = typename VecOf<T>::type;
  constexpr int kChains = 4;  // the latency of an fma, in fmas
  Vec sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = Vec::zero();
  int64_t i = 0;
  for (; i + kChains * Vec::kLanes <= n; i += kChains * Vec::kLanes) {
    for (int c = 0; c < kChains; ++c) {
      const int64_t at = i + c * Vec::kLanes;
      sums[c] = Vec::fma(Vec::load(a + at), Vec::load(b + at), sums[c]);
    }
  }
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) {
    sums[0] = Vec::fma(Vec::load(a + i), Vec::load(b + i), sums[0]);
  }
  T total = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

template <class CopyRow>
void for_each_row(const RowCopy& copy, const CopyRow& copy_row) {
  for (int64_t o = 0; o < copy.outer; ++o) {
    const char* from = copy.from + o * copy.from_outer;
    char* to = copy.to + o * copy.to_outer;
    for (int64_t i = 0; i < copy.inner; ++i) {
      copy_row(from + i * copy.from_inner, to + i * copy.to_inner);
    }
  }
}

template <int kSteps>
void copy_rows_of(const RowCopy& copy) {
  // A size that the compiler knows becomes moves of whole vectors, at any address.
  for_each_row(
      copy, [](const char* from, char* to) { __builtin_memcpy(to, from, kSteps * sizeof(F32)); });
}

void stream_rows(const RowCopy& copy) {
  for_each_row(copy, [bytes = copy.bytes](const char* from, char* to) {
    constexpr int64_t kStep = sizeof(F32);
    for (int64_t i = 0; i < bytes; i += kStep) F32::stream(from + i, to + i);
  });
  F32::end_streams();
}

bool writes_whole_lines(const RowCopy& copy) {
  constexpr int64_t kLine = 64;
  const auto address = reinterpret_cast<__UINTPTR_TYPE__>(copy.to);
  return (address | copy.to_outer | copy.to_inner | copy.bytes) % kLine == 0;
}

void copy_rows(const RowCopy& rows) {
  constexpr int64_t kStep = sizeof(F32);
  RowCopy copy = rows;
  if (copy.from_inner == copy.bytes && copy.to_inner == copy.bytes) {
    copy.bytes *= copy.inner;
    copy.inner = 1;
    copy.to_inner = 0;
  }
  if (copy.past_caches && writes_whole_lines(copy)) return stream_rows(copy);
  switch (copy.bytes % kStep == 0 ? copy.bytes / kStep : 0) {
    case 1:
      return copy_rows_of<1>(copy);
    case 2:
      return copy_rows_of<2>(copy);
    case 3:
      return copy_rows_of<3>(copy);
    case 4:
      return copy_rows_of<4>(copy);
    case 6:
      return copy_rows_of<6>(copy);
    case 8:
      return copy_rows_of<8>(copy);
  }
  for_each_row(copy, [bytes = copy.bytes](const char* from, char* to) {
    __builtin_memcpy(to, from, bytes);
  });
}

#include "attention-inl.h"
#include "elementwise-inl.h"
#include "linear-inl.h"
#include "low_rank-inl.h"
#include "prefill_attention-inl.h"
#include "sampling-inl.h"

constexpr Kernels make_kernels(const char* isa) {
  return {
      isa,
      {add_rows<float>, add_rows<double>, add_rows<BFloat16>, add_rows<Float16>},
      {lerp<float>, lerp<double>, lerp<BFloat16>, lerp<Float16>},
      {add<float>, add<double>, add<BFloat16>, add<Float16>},
      dot<float>,
      dot<double>,
      scaled_product,
      rotate_pairs,
      silu_and_multiply,
      maximum,
      exponentials,
      copy_rows,
      {attend<float>, attend<double>, attend<BFloat16>, attend<Float16>},
      {merge_splits<float>, merge_splits<double>, merge_splits<BFloat16>, merge_splits<Float16>},
      {attend_tokens<float>, nullptr, attend_tokens<BFloat16>, attend_tokens<Float16>},
      {make_linear<Float32Lines>(), make_linear<BFloat16Lines>(), make_linear<Int8Groups>(),
       make_linear<Int4Groups>()},
      add_columns,
  };
}
