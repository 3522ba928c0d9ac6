// Pieces of one block of scratch memory.
#pragma once

#include <cstdint>

#include "../arithmetic.h"

namespace firstlm::cuda {

// Hands out pieces one after the other, each at a multiple of 16 bytes. From a null base it only
// counts: the same code then says how much is needed.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + bytes_ : nullptr;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return reinterpret_cast<T*>(piece);
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 16;

  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace firstlm::cuda
