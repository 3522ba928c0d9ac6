#include "team.h"

#include <pthread.h>
#include <signal.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace firstlm {
namespace {

constexpr int kCacheLine = 64;

int available_cores() {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

// What a waiting thread does between two looks.
class Backoff {
 public:
  explicit Backoff(int spins) : spins_left_(spins) {}

  void pause() {
    if (spins_left_ == 0) return std::this_thread::yield();
    --spins_left_;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // `yield` is a no-op on most cores
#endif
  }

 private:
  int spins_left_;
};

// A mutex that serves in the order of arrival. (An atomic int is what a futex waits on directly.)
class Queue {
 public:
  void lock() {
    const int mine = next_.fetch_add(1, std::memory_order_relaxed);
    int served;
    while ((served = served_.load()) != mine) served_.wait(served);
  }
  void unlock() {
    served_.fetch_add(1);
    served_.notify_all();
  }

 private:
  std::atomic<int> next_{0}, served_{0};
};

// Set while the thread is inside a run.
thread_local bool in_run = false;

class InRun {
 public:
  InRun() {
    if (in_run) throw std::logic_error("Team::run was called inside a run of a team");
    in_run = true;
  }
  ~InRun() { in_run = false; }
};

// What the other threads get from a barrier that one will never reach.
struct BrokenBarrier {};

// One body on its way through the threads of a team.
struct Run {
  using Call = void (*)(const void* body, Share share);
  static constexpr uint32_t kBroken = 1;

  explicit Run(int size) : size(size), spins(size <= available_cores() ? 2000 : 0) {}

  void start(Call next_call, const void* next_body) {
    call = next_call;
    body = next_body;
    failed = false;
    arrived.store(0, std::memory_order_relaxed);
    phase.store(0, std::memory_order_relaxed);
    workers_left.store(size - 1, std::memory_order_relaxed);
  }

  void execute(int rank) {
    try {
      call(body, Share{rank, size});
    } catch (const BrokenBarrier&) {
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      phase.fetch_or(kBroken);
    }
  }

  void barrier() {
    const uint32_t now = phase.load(std::memory_order_acquire);
    if (now & kBroken) throw BrokenBarrier{};
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived.store(0, std::memory_order_relaxed);
      phase.fetch_add(2, std::memory_order_release);
      return;
    }
    Backoff backoff(spins);
    uint32_t then;
    while ((then = phase.load(std::memory_order_acquire)) == now) backoff.pause();
    if (then & kBroken) throw BrokenBarrier{};
  }

  void wait_for_workers() {
    Backoff backoff(spins);
    while (workers_left.load(std::memory_order_acquire) > 0) backoff.pause();
  }

  // The exception of a body, if there was one.
  void finish() {
    if (failed) std::rethrow_exception(std::exchange(error, nullptr));
  }

  const int size;
  const int spins;  // of a waiting thread before it yields: none if threads share cores
  Call call = nullptr;
  const void* body = nullptr;
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the thread that set `failed`
  // At the barrier; its phase grows by 2 when all are; workers that have not returned.
  alignas(kCacheLine) std::atomic<int> arrived{0};
  alignas(kCacheLine) std::atomic<uint32_t> phase{0};
  alignas(kCacheLine) std::atomic<int> workers_left{0};
};

// A thread that executes one rank of the runs that it is given.
class alignas(kCacheLine) Worker {
 public:
  explicit Worker(int rank) : rank_(rank) {
    std::thread([this] { work(); }).detach();
  }

  void give(Run* run) {
    run_ = run;
    given_.fetch_add(1);
    given_.notify_one();
  }

 private:
  [[noreturn]] void work() {
    in_run = true;
    for (int taken = 0, spins = 0;; ++taken) {
      wait_for_more_than(taken, spins);
      Run* run = run_;
      spins = run->spins;
      run->execute(rank_);
      run->workers_left.fetch_sub(1, std::memory_order_release);
    }
  }

  // Stays awake for the time between two tokens.
  void wait_for_more_than(int taken, int spins) {
    constexpr auto kAwake = std::chrono::microseconds(100);
    constexpr int kLooksPerClock = 16;
    const auto sleep_at = std::chrono::steady_clock::now() + kAwake;
    Backoff backoff(spins);
    do {
      for (int i = 0; i < kLooksPerClock; ++i) {
        if (given_.load(std::memory_order_acquire) != taken) return;
        backoff.pause();
      }
    } while (std::chrono::steady_clock::now() < sleep_at);
    given_.wait(taken, std::memory_order_acquire);
  }

  const int rank_;
  Run* run_ = nullptr;
  std::atomic<int> given_{0};
};

// Threads started while it lives take no signals: those are for the threads of the program.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// The workers of the process. Never destroyed, and they are never joined: in whatever order a
// process ends, they find what they wait on.
class Pool {
 public:
  static Pool& instance() {
    Pool* pool = current.load(std::memory_order_acquire);
    if (pool) return *pool;
    auto fresh = std::make_unique<Pool>();
    return *(current.compare_exchange_strong(pool, fresh.get()) ? fresh.release() : pool);
  }

  void execute(Run& run, Run::Call call, const void* body) {
    const std::lock_guard lock(queue_);
    while (num_workers_ < run.size - 1) add_worker();
    run.start(call, body);
    for (int i = 0; i < run.size - 1; ++i) workers_[i]->give(&run);
    run.execute(0);
    run.wait_for_workers();
    run.finish();
  }

 private:
  void add_worker() {
    const SignalsBlocked blocked;
    workers_[num_workers_] = std::make_unique<Worker>(num_workers_ + 1);
    ++num_workers_;
  }

  // A child of fork has none of the threads: it begins anew.
  static void forget() {
    current = nullptr;
    in_run = false;
  }

  static inline std::atomic<Pool*> current{nullptr};
  static inline const int registered = pthread_atfork(nullptr, nullptr, forget);

  Queue queue_;
  int num_workers_ = 0;
  std::array<std::unique_ptr<Worker>, Team::kMaxSize - 1> workers_;
};

}  // namespace

struct Team::State {
  explicit State(int size) : run(size) {}
  Run run;
};

Team::Team(int size) {
  if (size < 1 || size > kMaxSize) {
    throw std::invalid_argument("a team has 1 to " + std::to_string(kMaxSize) + " threads, not " +
                                std::to_string(size));
  }
  state_ = std::make_unique<State>(size);
}

Team::~Team() = default;

int Team::size() const { return state_->run.size; }

void Team::dispatch(Call call, const void* body) {
  const InRun inside;
  if (size() == 1) return call(body, Share{0, 1});
  Pool::instance().execute(state_->run, call, body);
}

void Team::barrier() {
  if (size() > 1) state_->run.barrier();
}

}  // namespace firstlm
