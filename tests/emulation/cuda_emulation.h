// CUDA C++ on the host, for tests: what csrc/cuda needs of the language extension, so that the same
// .cu files compile with an ordinary compiler.
//
// A grid runs block by block on one thread of the host. The threads of a block are fibers: a
// barrier or a shuffle suspends the thread until the others have arrived, as on a GPU, and a
// barrier that some thread does not reach is an error. Threads run in ascending order, or
// descending after set_backward(true): results must not differ. The spans of csrc/cuda/span.cuh
// report every access to AccessLog and SharedLog, which raise std::runtime_error for what a GPU
// would let pass.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarpSize = 32;

void set_backward(bool backward);

// Runs `thread` once for every thread of the grid.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);

// Throws, naming the thread that runs.
[[noreturn]] void fail(const std::string& what);

// Of the thread that runs: its number in its block and in the grid, its block's number among all
// blocks ever run, and how many barriers the block has passed.
int thread_in_block();
int64_t thread_in_grid();
int64_t block_number();
int64_t barriers_passed();

void barrier();

// What the lanes of the warp handed in, by lane.
struct LaneValues {
  uint64_t bits[kWarpSize];
};
const LaneValues& exchange(unsigned mask, uint64_t bits);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

// --- Intrinsics ---------------------------------------------------------------------------------

inline void __syncthreads() { emulation::barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  const int lane = emulation::thread_in_block() % emulation::kWarpSize;
  const auto& values = emulation::exchange(mask, emulation::to_bits(value));
  return emulation::from_bits<T>(values.bits[lane ^ lane_mask]);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto& values = emulation::exchange(mask, predicate != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
    ballot |= static_cast<unsigned>(values.bits[lane]) << lane;
  }
  return ballot;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

// One more than the number of the lowest set bit.
inline int __ffs(int x) { return __builtin_ffs(x); }

namespace firstlm::cuda {

// --- Checks of every access
// -----------------------------------------------------------------------

// Of one span, shared by its copies. Bounds and alignment always; for spans that are written, also
// that no element is written twice or touched by another thread than the one that writes it.
class AccessLog {
 public:
  AccessLog(const void* data, int64_t size, int64_t element_bytes, bool is_written);

  void read(int64_t i, int count) const;
  void write(int64_t i, int count) const;
  void expect_all_written() const;

 private:
  // Thread of the grid, or one of these.
  static constexpr int64_t kNobody = -1, kSeveral = -2;
  struct Element {
    int64_t reader = kNobody, writer = kNobody;
  };

  void check(int64_t i, int count, const char* access) const;

  const char* data_;
  int64_t size_, element_bytes_;
  std::shared_ptr<std::vector<Element>> elements_;  // null for spans that are only read
};

struct SharedElement {
  int64_t block = -1;                   // what follows is of this block
  int64_t written = -1, was_read = -1;  // barriers that the block had passed then
  int writer = -1, reader = -1;         // threads of the block

  void read(int i, int size);
  void write(int i, int size);

 private:
  static constexpr int kSeveral = -2;
  void enter_block();
};

template <int N>
struct SharedLog {
  mutable SharedElement elements[N];

  void read(int i) const { at(i).read(i, N); }
  void write(int i) const { at(i).write(i, N); }

 private:
  SharedElement& at(int i) const {
    if (i < 0 || i >= N) {
      emulation::fail("touches element " + std::to_string(i) + " of a shared array of " +
                      std::to_string(N));
    }
    return elements[i];
  }
};

// --- Launch
// -----------------------------------------------------------------------------------------

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void*, Args... args) {
  emulation::run_grid(grid, block, [&] { kernel(args...); });
  const auto finish = [](const auto& arg) {
    if constexpr (requires { arg.log(); }) arg.log().expect_all_written();
  };
  (finish(args), ...);
}

}  // namespace firstlm::cuda
