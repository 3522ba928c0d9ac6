#include "cuda_emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

enum class State { kReady, kAtBarrier, kAtExchange, kReturned };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 index;
  int number = 0;
  State state = State::kReady;
  int64_t exchanges = 0;
};

struct Warp {
  int arrived = 0;
  int64_t exchanges = 0;  // completed
  // By parity: a lane may hand in its next value while others still read the last ones, but it
  // cannot be two exchanges ahead.
  LaneValues values[2];
};

// The block that runs. One grid at a time runs in a process.
struct Block {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;  // as many as the largest block had
  std::vector<Warp> warps;
  const std::function<void()>* thread = nullptr;
  Fiber* running = nullptr;
  std::exception_ptr error;
  int threads = 0;
  int at_barrier = 0;
  int64_t barriers = 0;
  int64_t number = 0;
};

Block block;
std::mutex one_grid_at_a_time;
bool is_backward = false;

void run_thread() {
  try {
    (*block.thread)();
  } catch (...) {
    block.error = std::current_exception();
  }
  block.running->state = State::kReturned;
  swapcontext(&block.running->context, &block.scheduler);
}

void suspend(State state) {
  Fiber& self = *block.running;
  self.state = state;
  swapcontext(&self.context, &block.scheduler);
}

bool is_ready(const Fiber& fiber) {
  switch (fiber.state) {
    case State::kReady:
      return true;
    case State::kAtExchange:
      return block.warps[fiber.number / kWarpSize].exchanges == fiber.exchanges;
    default:
      return false;
  }
}

void resume(Fiber& fiber) {
  fiber.state = State::kReady;
  block.running = &fiber;
  threadIdx = fiber.index;
  swapcontext(&block.scheduler, &fiber.context);
  if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
}

dim3 nth(int64_t i, dim3 size) {
  const int64_t x = i % size.x, y = i / size.x % size.y, z = i / size.x / size.y;
  return dim3(x, y, z);
}

void start_threads(dim3 size) {
  block.threads = size.x * size.y * size.z;
  block.at_barrier = 0;
  block.barriers = 0;
  ++block.number;
  block.warps.assign((block.threads + kWarpSize - 1) / kWarpSize, Warp());
  while (std::ssize(block.fibers) < block.threads) {
    block.fibers.push_back(std::make_unique<Fiber>());
  }
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.index = nth(i, size);
    fiber.number = i;
    fiber.state = State::kReady;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
  }
}

[[noreturn]] void fail_stuck() {
  int counts[4] = {};
  for (int i = 0; i < block.threads; ++i) ++counts[static_cast<int>(block.fibers[i]->state)];
  const auto count = [&](State state) { return std::to_string(counts[static_cast<int>(state)]); };
  throw std::runtime_error(
      "CUDA emulation: the threads of a block wait for ever: " + count(State::kAtBarrier) +
      " at a barrier, " + count(State::kAtExchange) + " at a shuffle, " + count(State::kReturned) +
      " have returned");
}

void run_block(dim3 size) {
  start_threads(size);
  int returned = 0;
  while (returned < block.threads) {
    bool any_ran = false;
    for (int i = 0; i < block.threads; ++i) {
      Fiber& fiber = *block.fibers[is_backward ? block.threads - 1 - i : i];
      if (!is_ready(fiber)) continue;
      resume(fiber);
      any_ran = true;
      returned += fiber.state == State::kReturned;
    }
    if (!any_ran) fail_stuck();
  }
}

}  // namespace

void set_backward(bool backward) { is_backward = backward; }

void run_grid(dim3 grid, dim3 size, const std::function<void()>& thread) {
  const std::lock_guard lock(one_grid_at_a_time);
  block.thread = &thread;
  gridDim = grid;
  blockDim = size;
  const int64_t blocks = int64_t{1} * grid.x * grid.y * grid.z;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx = nth(is_backward ? blocks - 1 - i : i, grid);
    run_block(size);
  }
}

void fail(const std::string& what) {
  std::ostringstream message;
  const auto name = [&](dim3 i) { message << "(" << i.x << ", " << i.y << ", " << i.z << ")"; };
  message << "CUDA emulation: thread ";
  name(threadIdx);
  message << " of block ";
  name(blockIdx);
  message << " " << what;
  throw std::runtime_error(message.str());
}

int thread_in_block() { return block.running->number; }

int64_t thread_in_grid() {
  const int64_t in_grid = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  return in_grid * block.threads + thread_in_block();
}

int64_t block_number() { return block.number; }

int64_t barriers_passed() { return block.barriers; }

void barrier() {
  if (++block.at_barrier < block.threads) return suspend(State::kAtBarrier);
  block.at_barrier = 0;
  ++block.barriers;
  for (int i = 0; i < block.threads; ++i) {
    if (block.fibers[i]->state == State::kAtBarrier) block.fibers[i]->state = State::kReady;
  }
}

const LaneValues& exchange(unsigned mask, uint64_t bits) {
  if (mask != 0xffffffffu || block.threads % kWarpSize != 0) {
    fail("takes part in an exchange of an incomplete warp");
  }
  Fiber& self = *block.running;
  Warp& warp = block.warps[self.number / kWarpSize];
  LaneValues& values = warp.values[self.exchanges++ % 2];
  values.bits[self.number % kWarpSize] = bits;
  if (++warp.arrived == kWarpSize) {
    warp.arrived = 0;
    ++warp.exchanges;
  } else {
    suspend(State::kAtExchange);
  }
  return values;
}

}  // namespace emulation

namespace firstlm::cuda {

using emulation::fail;

AccessLog::AccessLog(const void* data, int64_t size, int64_t element_bytes, bool is_written)
    : data_(static_cast<const char*>(data)), size_(size), element_bytes_(element_bytes) {
  if (is_written) elements_ = std::make_shared<std::vector<Element>>(size);
}

void AccessLog::check(int64_t i, int count, const char* access) const {
  if (i < 0 || i + count > size_) {
    fail(std::string(access) + " elements [" + std::to_string(i) + ", " +
         std::to_string(i + count) + ") of " + std::to_string(size_));
  }
  const auto address = reinterpret_cast<uintptr_t>(data_ + i * element_bytes_);
  if (address % (count * element_bytes_) != 0) {
    fail(std::string(access) + " " + std::to_string(count * element_bytes_) +
         " bytes at an address that is not a multiple of that");
  }
}

void AccessLog::read(int64_t i, int count) const {
  check(i, count, "reads");
  if (!elements_) return;
  const int64_t self = emulation::thread_in_grid();
  for (int64_t j = i; j < i + count; ++j) {
    Element& element = (*elements_)[j];
    if (element.writer != kNobody && element.writer != self) {
      fail("reads element " + std::to_string(j) + ", which another thread writes");
    }
    element.reader = element.reader == kNobody || element.reader == self ? self : kSeveral;
  }
}

void AccessLog::write(int64_t i, int count) const {
  check(i, count, "writes");
  const int64_t self = emulation::thread_in_grid();
  for (int64_t j = i; j < i + count; ++j) {
    Element& element = (*elements_)[j];
    if (element.writer != kNobody) {
      fail("writes element " + std::to_string(j) + ", which has been written");
    }
    if (element.reader != kNobody && element.reader != self) {
      fail("writes element " + std::to_string(j) + ", which another thread reads");
    }
    element.writer = self;
  }
}

void AccessLog::expect_all_written() const {
  const auto missing =
      std::find_if(elements_->begin(), elements_->end(),
                   [](const Element& element) { return element.writer == kNobody; });
  if (missing != elements_->end()) {
    throw std::runtime_error("CUDA emulation: element " +
                             std::to_string(missing - elements_->begin()) + " of an output of " +
                             std::to_string(size_) + " was not written");
  }
}

namespace {

[[noreturn]] void fail_shared(const char* access, int i, int size, const char* why) {
  fail(std::string(access) + " element " + std::to_string(i) + " of a shared array of " +
       std::to_string(size) + why);
}

}  // namespace

void SharedElement::enter_block() {
  if (block != emulation::block_number()) *this = SharedElement{emulation::block_number()};
}

void SharedElement::read(int i, int size) {
  enter_block();
  const int self = emulation::thread_in_block();
  const int64_t now = emulation::barriers_passed();
  if (written < 0) fail_shared("reads", i, size, " before it is written");
  if (written == now && writer != self) {
    fail_shared("reads", i, size, " without a barrier after another thread's write");
  }
  reader = was_read != now || reader == self ? self : kSeveral;
  was_read = now;
}

void SharedElement::write(int i, int size) {
  enter_block();
  const int self = emulation::thread_in_block();
  const int64_t now = emulation::barriers_passed();
  if ((written == now && writer != self) || (was_read == now && reader != self)) {
    fail_shared("writes", i, size, " without a barrier after another thread's access");
  }
  written = now;
  writer = self;
}

}  // namespace firstlm::cuda
