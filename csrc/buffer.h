// Scratch memory that is written before it is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace firstlm {

// Elements of T at a 64-byte boundary, not initialised. Grows, never shrinks, and forgets what it
// holds when it grows.
template <class T>
class Buffer {
 public:
  T* data() { return data_.get(); }

  // Room for `count` elements. Half as much again is taken, so that what grows step by step seldom
  // allocates.
  T* reserve(int64_t count) {
    if (count > capacity_) {
      const int64_t capacity = capacity_ == 0 ? count : count + count / 2;
      data_.reset();
      capacity_ = 0;
      data_.reset(static_cast<T*>(::operator new(capacity * sizeof(T), kAlignment)));
      capacity_ = capacity;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

}  // namespace firstlm
