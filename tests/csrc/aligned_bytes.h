// Memory that starts at a line of 64 bytes, as packed weights and prepared inputs do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace firstlm {

class AlignedBytes {
 public:
  explicit AlignedBytes(int64_t size, std::byte value = {})
      : lines_((size + 63) / 64), size_(size) {
    for (int64_t i = 0; i < size; ++i) data()[i] = value;
  }
  std::byte* data() { return lines_.empty() ? nullptr : lines_[0].bytes; }
  const std::byte* data() const { return lines_.empty() ? nullptr : lines_[0].bytes; }
  int64_t size() const { return size_; }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> lines_;
  int64_t size_;
};

}  // namespace firstlm
