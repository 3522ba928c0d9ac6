// Packed columns: what they read, and what they add, on every instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "aligned_bytes.h"
#include "catch.h"
#include "low_rank.h"
#include "random_values.h"

namespace firstlm {
namespace {

float rounded(float x) {
  BFloat16 half;
  narrow(x, &half);
  return widen(half);
}

// The adapters of some modules of one matrix: B [N, R] is zero but for the columns of a row's
// module.
struct Columns {
  int64_t N, R;
  std::vector<float> B;
  AlignedBytes bytes;
  PackedColumns packed;

  Columns(std::vector<int64_t> rows, std::vector<int64_t> ranks)
      : N(0), R(0), B(dense(rows, ranks)), bytes(packed_columns_bytes(B.data(), N, R)) {
    pack_columns(B.data(), N, R, bytes.data());
    packed = packed_columns(bytes.data(), bytes.size(), N, R);
  }

 private:
  std::vector<float> dense(const std::vector<int64_t>& rows, const std::vector<int64_t>& ranks) {
    for (const int64_t n : rows) N += n;
    for (const int64_t r : ranks) R += r;
    R += R % 2;
    std::vector<float> values = random_values<float>(N * R, 1);
    int64_t row = 0, column = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int64_t n = row; n < row + rows[i]; ++n) {
        for (int64_t r = 0; r < R; ++r) {
          if (r < column || r >= column + ranks[i]) values[n * R + r] = 0;
        }
      }
      row += rows[i];
      column += ranks[i];
    }
    return values;
  }
};

std::vector<float> add(const Kernels& kernels, const Columns& c, const std::vector<float>& z,
                       int64_t M, std::vector<float> y, std::vector<int64_t> bounds) {
  const int64_t stride_z = c.R + 1, stride_y = c.N + 3;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    add_columns(kernels, c.packed, z.data(), stride_z, M, bounds[i], bounds[i + 1], y.data(),
                stride_y);
  }
  return y;
}

TEST_CASE("low rank: packed columns add what the dense ones do, and nothing else") {
  std::mt19937 random(1);
  const auto draw = [&](int64_t first, int64_t last) {
    return std::uniform_int_distribution<int64_t>(first, last)(random);
  };
  for (int i = 0; i < 40; ++i) {
    const Columns c({draw(1, 70), draw(0, 40), draw(0, 40)}, {draw(0, 20), draw(0, 9), draw(1, 9)});
    const int64_t M = draw(1, 9), panels = ceil_div(c.N, kPanelRows), middle = draw(0, panels);
    const std::vector<float> z = random_values<float>(M * (c.R + 1), 2);
    const std::vector<float> y = random_values<float>(M * (c.N + 3), 3);
    for (const Kernels* kernels : available_kernels()) {
      INFO(kernels->isa << ", N " << c.N << ", R " << c.R << ", M " << M);
      const std::vector<float> found = add(*kernels, c, z, M, y, {0, panels});
      CHECK(found == add(*kernels, c, z, M, y, {0, middle, panels}));
      int64_t wrong = 0;
      for (int64_t m = 0; m < M; ++m) {
        const float *before = &y[m * (c.N + 3)], *after = &found[m * (c.N + 3)];
        for (int64_t n = 0; n < c.N; ++n) {
          double expected = before[n], magnitude = std::abs(before[n]);
          for (int64_t r = 0; r < c.R; ++r) {
            const double term = rounded(c.B[n * c.R + r]) * z[m * (c.R + 1) + r];
            expected += term;
            magnitude += std::abs(term);
          }
          wrong += !(std::abs(after[n] - expected) <= (c.R + 2) * 0x1p-24 * magnitude);
        }
        wrong += !std::equal(before + c.N, before + c.N + 3, after + c.N);
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("low rank: the number of tokens changes no bit") {
  const Columns c({40, 30}, {16, 8});
  const int64_t M = 11, panels = ceil_div(c.N, kPanelRows);
  const std::vector<float> z = random_values<float>(M * (c.R + 1), 2);
  const std::vector<float> y = random_values<float>(M * (c.N + 3), 3);
  for (const Kernels* kernels : available_kernels()) {
    const std::vector<float> together = add(*kernels, c, z, M, y, {0, panels});
    for (int64_t m = 0; m < M; ++m) {
      const std::vector<float> own(&z[m * (c.R + 1)], &z[m * (c.R + 1)] + c.R + 1);
      const std::vector<float> row(&y[m * (c.N + 3)], &y[m * (c.N + 3)] + c.N + 3);
      const std::vector<float> alone = add(*kernels, c, own, 1, row, {0, panels});
      CHECK(std::equal(alone.begin(), alone.end(), &together[m * (c.N + 3)]));
    }
  }
}

TEST_CASE("low rank: a panel has the lines of its own module") {
  const Columns c({32, 16, 48}, {16, 16, 16});
  const int64_t table = kLineBytes * ceil_div(6 * 16, kLineBytes);
  CHECK(c.bytes.size() == table + 6 * 8 * kLineBytes);
  CHECK(Columns({5}, {0}).bytes.size() == kLineBytes);
}

TEST_CASE("low rank: bytes that are no packed columns are refused") {
  Columns c({40, 30}, {16, 8});
  const auto refused = [&](int64_t bytes, int64_t N, int64_t R) {
    CHECK_THROWS_WITH(packed_columns(c.bytes.data(), bytes, N, R), "is no packed B of these sizes");
  };
  const int64_t size = c.bytes.size();
  refused(size - kLineBytes, c.N, c.R);
  refused(size + kLineBytes, c.N, c.R);
  refused(0, c.N, c.R);
  refused(size, c.N + 16, c.R);
  refused(size, c.N, 16);
  for (const size_t at : {0, 4, 8}) {
    AlignedBytes damaged = c.bytes;
    const int32_t value = -1;
    std::memcpy(damaged.data() + at, &value, sizeof value);
    CHECK_THROWS(packed_columns(damaged.data(), size, c.N, c.R));
  }
}

}  // namespace
}  // namespace firstlm
