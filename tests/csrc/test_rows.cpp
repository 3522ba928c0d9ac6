// The core's masked layer execution against a few lines in double, on every instruction set.
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "catch.h"
#include "random_values.h"
#include "rows.h"

namespace firstlm {
namespace {

// Elements of a row: around the lanes of a vector, and more than a piece.
const int64_t kWidths[] = {1, 7, 16, 33, 577, 40000};
const double kGates[] = {0, 1, 0.25, 0.5, 0.9375};
constexpr int64_t kBatch = 5;

template <class T>
struct TypeName;
template <>
struct TypeName<float> {
  static constexpr DType dtype = DType::kFloat32;
  static constexpr double eps = 0x1p-23;
};
template <>
struct TypeName<double> {
  static constexpr DType dtype = DType::kFloat64;
  static constexpr double eps = 0x1p-52;
};
template <>
struct TypeName<BFloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr double eps = 0x1p-7;
};
template <>
struct TypeName<Float16> {
  static constexpr DType dtype = DType::kFloat16;
  static constexpr double eps = 0x1p-10;
};

template <class T>
ConstRows rows_of(const std::vector<T>& values, int64_t width) {
  return {reinterpret_cast<const std::byte*>(values.data()),
          width * static_cast<int64_t>(sizeof(T))};
}

template <class T>
Rows rows_of(std::vector<T>& values, int64_t width) {
  return {reinterpret_cast<std::byte*>(values.data()), width * static_cast<int64_t>(sizeof(T))};
}

template <class T>
RowSize size_of_row(int64_t width) {
  return {TypeName<T>::dtype, width * static_cast<int64_t>(sizeof(T))};
}

template <class T>
bool near(T actual, double expected, double magnitude) {
  return std::abs(widen(actual) - expected) <= 4 * TypeName<T>::eps * magnitude;
}

TEST_CASE("plan_rows lists, layer by layer, the sequences that keep it") {
  constexpr int64_t B = 3, L = 4;
  const bool keep[B * L] = {true, false, true, false, false, false,
                            true, true,  true, false, true,  false};
  std::vector<int64_t> rows(L * B), counts(L);
  plan_rows(keep, B, L, rows.data(), counts.data());
  CHECK(rows == std::vector<int64_t>{0, 2, -1, -1, -1, -1, 0, 1, 2, 1, -1, -1});
  CHECK(counts == std::vector<int64_t>{2, 0, 3, 1});
}

TEST_CASE("invert_rows finds the first row that is outside of the batch or named again") {
  std::vector<int64_t> update_of(4);
  const auto invert = [&](const std::vector<int64_t>& rows) {
    return invert_rows(rows.data(), rows.size(), 4, update_of.data());
  };
  CHECK(invert({3, -1, 0, -1}) == 4);
  CHECK(update_of == std::vector<int64_t>{2, -1, -1, 0});
  CHECK(invert({3, 4}) == 1);
  CHECK(invert({-2, 0}) == 0);
  CHECK(invert({1, 2, 1}) == 2);
}

TEST_CASE("gathered rows are copies, and zeros for -1") {
  const std::vector<int64_t> rows{4, -1, 0, 4};
  for (const int64_t width : kWidths) {
    const std::vector<float> hidden = random_values<float>(kBatch * width, 1);
    for (const int threads : {1, 3}) {
      std::vector<float> out(rows.size() * width, NAN);
      gather_rows(rows_of(hidden, width), rows.data(), rows.size(), width * 4, threads,
                  rows_of(out, width));
      for (size_t r = 0; r < rows.size(); ++r) {
        for (int64_t i = 0; i < width; ++i) {
          const float expected = rows[r] < 0 ? 0 : hidden[rows[r] * width + i];
          if (out[r * width + i] != expected) FAIL("row " << r << ", element " << i);
        }
      }
    }
  }
}

// Out of place, in place and with several threads: the same bits, and those of the formula.
template <class T>
void check_scatter(const Kernels& kernels, int64_t width, double gate_value, bool has_gate) {
  INFO(kernels.isa << ", width " << width << ", gate " << gate_value);
  const std::vector<int64_t> rows{3, -1, 0};
  const std::vector<Accumulator<T>> gate(rows.size(), gate_value);
  const std::vector<T> hidden = random_values<T>(kBatch * width, 1);
  const std::vector<T> values = random_values<T>(rows.size() * width, 2);
  const RowUpdate update{rows.data(), static_cast<int64_t>(rows.size()), rows_of(values, width),
                         has_gate ? gate.data() : nullptr};
  std::vector<int64_t> update_of(kBatch);
  invert_rows(rows.data(), rows.size(), kBatch, update_of.data());

  std::vector<T> out = random_values<T>(hidden.size(), 3), again = out, in_place = hidden;
  scatter_rows(kernels, rows_of(hidden, width), kBatch, update, update_of.data(),
               size_of_row<T>(width), 1, rows_of(out, width));
  scatter_rows(kernels, rows_of(hidden, width), kBatch, update, update_of.data(),
               size_of_row<T>(width), 3, rows_of(again, width));
  scatter_rows_in_place(kernels, rows_of(in_place, width), update, size_of_row<T>(width), 3);
  const double g = has_gate ? gate_value : 1;
  int wrong = 0;
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = b * width + i, r = update_of[b];
      const double old_value = widen(hidden[at]);
      const double value = r < 0 ? old_value : widen(values[r * width + i]);
      const double expected = r < 0 ? old_value : (1 - g) * old_value + g * value;
      const bool is_copy = r < 0 || g == 0 || g == 1;
      const double magnitude = is_copy ? 0 : std::abs(old_value) + std::abs(value);
      wrong += !near(out[at], expected, magnitude);
      wrong += widen(out[at]) != widen(again[at]) || widen(out[at]) != widen(in_place[at]);
    }
  }
  CHECK(wrong == 0);
}

template <class T>
void check_scatters() {
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t width : kWidths) {
      check_scatter<T>(*kernels, width, 1, false);
      for (const double gate : kGates) check_scatter<T>(*kernels, width, gate, true);
    }
  }
}

TEST_CASE("scattered float32 rows are copies or blends") { check_scatters<float>(); }
TEST_CASE("scattered float64 rows are copies or blends") { check_scatters<double>(); }
TEST_CASE("scattered bfloat16 rows are copies or blends") { check_scatters<BFloat16>(); }
TEST_CASE("scattered float16 rows are copies or blends") { check_scatters<Float16>(); }

template <class T>
void check_scatter_add(const Kernels& kernels, int64_t width) {
  INFO(kernels.isa << ", width " << width);
  const std::vector<int64_t> rows{3, -1, 0, 3};
  const std::vector<T> hidden = random_values<T>(kBatch * width, 1);
  const std::vector<T> update = random_values<T>(rows.size() * width, 2);
  std::vector<T> out = hidden, portable = hidden;
  scatter_add_rows(kernels, rows_of(out, width), rows.data(), rows.size(), rows_of(update, width),
                   size_of_row<T>(width), 3);
  scatter_add_rows(*available_kernels()[0], rows_of(portable, width), rows.data(), rows.size(),
                   rows_of(update, width), size_of_row<T>(width), 1);
  int wrong = 0;
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t i = 0; i < width; ++i) {
      double expected = widen(hidden[b * width + i]), magnitude = std::abs(expected);
      for (size_t r = 0; r < rows.size(); ++r) {
        if (rows[r] != b) continue;
        expected += widen(update[r * width + i]);
        magnitude += std::abs(widen(update[r * width + i]));
      }
      wrong += !near(out[b * width + i], expected, magnitude);
      wrong += widen(out[b * width + i]) != widen(portable[b * width + i]);
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("updates are added to the rows that they name, to the same bits everywhere") {
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t width : kWidths) {
      check_scatter_add<float>(*kernels, width);
      check_scatter_add<double>(*kernels, width);
      check_scatter_add<BFloat16>(*kernels, width);
      check_scatter_add<Float16>(*kernels, width);
    }
  }
}

// Every float near the values of a 16-bit type is narrowed by vectors as by the scalar function.
template <class T>
void check_vector_narrowing(DType dtype) {
  std::vector<float> floats;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = widen(T{static_cast<uint16_t>(bits)});
    for (const float factor : {1.0f, 1.0f + 0x1p-9f, 1.0f + 0x1p-12f}) {
      floats.push_back(value * factor);
    }
  }
  std::vector<T> low(floats.size()), high(floats.size()), out(floats.size());
  for (size_t i = 0; i < floats.size(); ++i) {
    narrow(floats[i], &low[i]);
    narrow(floats[i] - widen(low[i]), &high[i]);
  }
  for (const Kernels* kernels : available_kernels()) {
    INFO(kernels->isa);
    out = low;
    kernels->add[static_cast<int>(dtype)](high.data(), out.size(), out.data());
    int wrong = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      T expected;
      narrow(widen(low[i]) + widen(high[i]), &expected);
      const bool are_nan = std::isnan(widen(out[i])) && std::isnan(widen(expected));
      wrong += !are_nan && out[i].bits != expected.bits;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("vectors round to bfloat16 and float16 as scalars do, infinities and NaNs included") {
  check_vector_narrowing<BFloat16>(DType::kBFloat16);
  check_vector_narrowing<Float16>(DType::kFloat16);
}

}  // namespace
}  // namespace firstlm
