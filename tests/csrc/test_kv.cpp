// Appending to the key/value cache, slot by slot.
#include <cstdint>
#include <numeric>
#include <vector>

#include "catch.h"
#include "kv.h"

namespace firstlm {
namespace {

// Tokens numbered from `first`, stored [R, T, H, D] as projections leave them or [R, H, T, D].
struct Side {
  int64_t R, H, C, T, D;
  bool heads_inside;
  std::vector<uint16_t> storage, tokens;

  Side(int64_t R, int64_t H, int64_t C, int64_t T, int64_t D, bool heads_inside, uint16_t first)
      : R(R),
        H(H),
        C(C),
        T(T),
        D(D),
        heads_inside(heads_inside),
        storage(R * H * C * D),
        tokens(R * H * T * D) {
    std::iota(tokens.begin(), tokens.end(), first);
  }

  int64_t stride_H() const { return heads_inside ? D : T * D; }
  int64_t stride_T() const { return heads_inside ? H * D : D; }

  NewTokens view() {
    return {storage.data(), tokens.data(),   R, H, C, T, D, R == 0 ? 0 : H * T * D, stride_H(),
            stride_T(),     sizeof(uint16_t)};
  }

  int64_t wrong_elements(const std::vector<int64_t>& start) const {
    int64_t wrong = 0;
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t h = 0; h < H; ++h) {
        for (int64_t c = 0; c < C; ++c) {
          for (int64_t d = 0; d < D; ++d) {
            const int64_t t = c - start[r];
            const uint16_t expected =
                t < 0 || t >= T ? 0 : tokens[r * H * T * D + h * stride_H() + t * stride_T() + d];
            wrong += storage[((r * H + h) * C + c) * D + d] != expected;
          }
        }
      }
    }
    return wrong;
  }
};

TEST_CASE("new tokens go to their slots and nothing else is touched") {
  for (const int64_t T : {0, 1, 3, 64, 65, 200, 1700}) {
    for (const bool heads_inside : {false, true}) {
      for (const int threads : {1, 3}) {
        INFO("T " << T << ", heads inside " << heads_inside << ", threads " << threads);
        const std::vector<int64_t> start = {5, 0, 11};
        Side keys(3, 2, T + 11, T, 7, heads_inside, 1);
        Side values(3, 2, T + 11, T, 20, !heads_inside, 3);
        kv_append(kernels(), keys.view(), values.view(), start.data(), threads);
        CHECK(keys.wrong_elements(start) == 0);
        CHECK(values.wrong_elements(start) == 0);
      }
    }
  }
}

TEST_CASE("a row that does not fit is found") {
  const std::vector<int64_t> start = {0, 3, 4, -1};
  CHECK(find_misfit(start.data(), 2, 5, 2) == 2);
  CHECK(find_misfit(start.data(), 4, 5, 2) == 2);
  CHECK(find_misfit(start.data() + 3, 1, 5, 2) == 0);
  CHECK(find_misfit(start.data(), 0, 5, 2) == 0);
}

}  // namespace
}  // namespace firstlm
