// What kernels read and write memory through. Compiled for a GPU, these are raw pointers; under
// emulation every access is checked: bounds, alignment, and that each element of an Output is
// written exactly once.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace firstlm::cuda {

inline constexpr int kAccessBytes = 16;  // the widest load and store

// N elements that are read or written at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// How many T one access can hold.
template <class T>
inline constexpr int kMaxPack = kAccessBytes / sizeof(T);

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kAccessBytes == 0;
}

// `size` elements that this kernel only reads.
template <class T>
class Input {
 public:
  Input(const void* data, int64_t size)
      : data_(static_cast<const T*>(data)), log_(data, size, sizeof(T), false) {}

  __device__ T load(int64_t i) const {
    log_.read(i, 1);
    return data_[i];
  }

  // Elements i … i + N - 1, whose address is a multiple of their size.
  template <int N>
  __device__ Pack<T, N> load_pack(int64_t i) const {
    log_.read(i, N);
    return *reinterpret_cast<const Pack<T, N>*>(data_ + i);
  }

 private:
  const T* data_;
  [[no_unique_address]] AccessLog log_;
};

// `size` elements of which some are read and some written; each by at most one thread.
template <class T>
class InOut {
 public:
  InOut(void* data, int64_t size)
      : data_(static_cast<T*>(data)), log_(data, size, sizeof(T), true) {}

  __device__ T load(int64_t i) const {
    log_.read(i, 1);
    return data_[i];
  }

  template <int N>
  __device__ Pack<T, N> load_pack(int64_t i) const {
    log_.read(i, N);
    return *reinterpret_cast<const Pack<T, N>*>(data_ + i);
  }

  __device__ void store(int64_t i, T value) const {
    log_.write(i, 1);
    data_[i] = value;
  }

  template <int N>
  __device__ void store_pack(int64_t i, const Pack<T, N>& pack) const {
    log_.write(i, N);
    *reinterpret_cast<Pack<T, N>*>(data_ + i) = pack;
  }

 protected:
  T* data_;
  [[no_unique_address]] AccessLog log_;
};

// `size` elements that this kernel writes, every one of them once, and never reads. It has to be an
// argument of the kernel itself: launch() then sees whether all were written.
template <class T>
class Output : private InOut<T> {
 public:
  using InOut<T>::InOut;
  using InOut<T>::store;
  using InOut<T>::store_pack;

  const AccessLog& log() const { return this->log_; }
};

// An array in the memory that the threads of a block share. Under emulation, elements that are read
// before they are written, and those that two threads touch without a barrier between, are errors.
template <class T, int N>
struct Shared {
  T data[N];
  [[no_unique_address]] SharedLog<N> log;

  __device__ T get(int i) const {
    log.read(i);
    return data[i];
  }

  __device__ void set(int i, T value) {
    log.write(i);
    data[i] = value;
  }
};

}  // namespace firstlm::cuda
