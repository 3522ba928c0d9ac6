// Every instruction set that this machine has, against plain loops in double and the portable twin.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "catch.h"
#include "cpu/kernels.h"

namespace firstlm {
namespace {

const int64_t kWidths[] = {0, 1, 3, 7, 8, 15, 16, 17, 31, 64, 100, 129, 577};

template <class T>
std::vector<T> random_values(int64_t n, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) {
    if constexpr (std::is_same_v<T, double>) {
      value = normal(random);
    } else {
      narrow(normal(random), &value);
    }
  }
  return values;
}

template <class T>
void check_add_rows(DType dtype) {
  using Sum = Accumulator<T>;
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t width : kWidths) {
      for (int count = 1; count <= kRowsPerPass; ++count) {
        INFO(kernels->isa << ", width " << width << ", rows " << count);
        std::vector<std::vector<T>> rows;
        std::vector<const void*> pointers;
        for (int r = 0; r < count; ++r) rows.push_back(random_values<T>(width, r));
        for (const auto& row : rows) pointers.push_back(row.data());
        // One element more than the kernel may touch.
        std::vector<Sum> sums = random_values<Sum>(width + 1, 9), twin = sums, before = sums;
        std::vector<Sum> one_by_one = sums;
        const auto table_index = static_cast<int>(dtype);
        kernels->add_rows[table_index](pointers.data(), count, width, {4096, true}, sums.data());
        available_kernels()[0]->add_rows[table_index](pointers.data(), count, width, {0, false},
                                                      twin.data());
        CHECK(sums == twin);
        for (const void* row : pointers) {
          kernels->add_rows[table_index](&row, 1, width, {64, false}, one_by_one.data());
        }
        CHECK(sums == one_by_one);
        CHECK(sums[width] == before[width]);
        for (int64_t i = 0; i < width; ++i) {
          double expected = before[i], magnitude = std::abs(expected);
          for (const auto& row : rows) {
            expected += widen(row[i]);
            magnitude += std::abs(widen(row[i]));
          }
          const double eps = std::numeric_limits<Sum>::epsilon();
          if (!(std::abs(sums[i] - expected) <= count * eps * magnitude)) {
            FAIL("element " << i << " is " << sums[i] << ", expected " << expected);
          }
        }
      }
    }
  }
}

TEST_CASE("add_rows adds up float32 rows") { check_add_rows<float>(DType::kFloat32); }
TEST_CASE("add_rows adds up float64 rows") { check_add_rows<double>(DType::kFloat64); }
TEST_CASE("add_rows adds up bfloat16 rows") { check_add_rows<BFloat16>(DType::kBFloat16); }
TEST_CASE("add_rows adds up float16 rows") { check_add_rows<Float16>(DType::kFloat16); }

template <class T, class Dot>
void check_dot(const Kernels& kernels, Dot dot) {
  for (const int64_t n : kWidths) {
    INFO(kernels.isa << ", length " << n);
    const std::vector<T> a = random_values<T>(n, 1), b = random_values<T>(n, 2);
    double expected = 0, magnitude = 0;
    for (int64_t i = 0; i < n; ++i) {
      expected += static_cast<double>(a[i]) * b[i];
      magnitude += std::abs(static_cast<double>(a[i]) * b[i]);
    }
    const double tolerance = (n + 4) * std::numeric_limits<T>::epsilon() * magnitude;
    CHECK(std::abs(dot(a.data(), b.data(), n) - expected) <= tolerance);
  }
}

TEST_CASE("dot is the sum of products") {
  for (const Kernels* kernels : available_kernels()) {
    check_dot<float>(*kernels, kernels->dot_f32);
    check_dot<double>(*kernels, kernels->dot_f64);
  }
}

// Copies 3 times 5 rows, `gap` bytes apart at their source; returns how many bytes are wrong.
int64_t wrong_bytes(const Kernels& kernels, int64_t bytes, int64_t gap, bool past_caches) {
  const int64_t outer = 3, inner = 5;
  const int64_t from_inner = bytes + gap, to_inner = bytes + gap / 6 * 64;
  const int64_t from_outer = inner * from_inner, to_outer = inner * to_inner + 128;
  const std::vector<BFloat16> source = random_values<BFloat16>(outer * from_outer, 1);
  const char* from = reinterpret_cast<const char*>(source.data());
  std::vector<char> storage(outer * to_outer + 64, 77), expected = storage;
  const int64_t to = -reinterpret_cast<intptr_t>(storage.data()) & 63;  // where a cache line begins
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      std::copy_n(from + o * from_outer + i * from_inner, bytes,
                  expected.data() + to + o * to_outer + i * to_inner);
    }
  }
  kernels.copy_rows({from, from_outer, from_inner, storage.data() + to, to_outer, to_inner, outer,
                     inner, bytes, past_caches});
  int64_t wrong = 0;
  for (size_t i = 0; i < storage.size(); ++i) wrong += storage[i] != expected[i];
  return wrong;
}

TEST_CASE("copy_rows writes every row and nothing more") {
  for (const Kernels* kernels : available_kernels()) {
    for (const int64_t bytes :
         {1, 2, 16, 30, 32, 48, 64, 128, 160, 192, 256, 384, 512, 513, 1024}) {
      for (const int64_t gap : {0, 6}) {
        for (const bool past_caches : {false, true}) {
          INFO(kernels->isa << ", bytes " << bytes << ", gap " << gap << ", past caches "
                            << past_caches);
          CHECK(wrong_bytes(*kernels, bytes, gap, past_caches) == 0);
        }
      }
    }
  }
}

TEST_CASE("tables are found by name, and an unknown name is an error that lists them") {
  for (const Kernels* kernels : available_kernels()) CHECK(&find_kernels(kernels->isa) == kernels);
  CHECK(&find_kernels("") == available_kernels().back());
  CHECK(std::string(available_kernels().front()->isa) == "portable");
  std::string message;
  try {
    find_kernels("vax");
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK(message.find("'vax'; this machine and build have portable") != std::string::npos);
}

}  // namespace
}  // namespace firstlm
