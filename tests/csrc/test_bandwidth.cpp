// Reading everything, once: the exclusive or shows what was left out or read twice.
#include <cstring>
#include <random>
#include <vector>

#include "bandwidth.h"
#include "catch.h"

namespace firstlm {
namespace {

TEST_CASE("every byte is read once") {
  std::mt19937 random(1);
  for (const size_t bytes : {0, 1, 8, 127, 128, 1000, 300'007, 2'000'001}) {
    std::vector<unsigned char> data(bytes);
    for (unsigned char& byte : data) byte = random() & 0xff;
    uint64_t expected = 0;
    for (size_t i = 0; i < bytes; i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, data.data() + i, std::min<size_t>(8, bytes - i));
      expected ^= word;
    }
    for (const int threads : {1, 3}) {
      INFO("bytes " << bytes << ", threads " << threads);
      CHECK(read_all(data.data(), bytes, threads) == expected);
    }
  }
}

}  // namespace
}  // namespace firstlm
