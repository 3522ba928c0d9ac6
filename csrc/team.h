// Threads that run one body side by side and meet at barriers: a token is one run of a team.
#pragma once

#include <cstdint>
#include <memory>

namespace firstlm {

// Which part of the work a thread of a team takes.
struct Share {
  int rank, size;

  struct Range {
    int64_t first, last;
  };
  // [0, count) cut in `size` consecutive parts that differ by one at most.
  Range of(int64_t count) const { return {count * rank / size, count * (rank + 1) / size}; }
};

// The calling thread and size - 1 threads of the process's own, which all teams share: runs of
// several callers queue, first come, first served. Waiting threads spin briefly, then yield;
// between runs they soon sleep. After a fork the child makes new threads.
class Team {
 public:
  static constexpr int kMaxSize = 256;

  explicit Team(int size);  // std::invalid_argument unless in [1, kMaxSize]
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const;

  // Calls body(share) once on each thread, and returns when all have returned. The first exception
  // that a body throws is thrown again here, after the others have ended (they leave their
  // barriers). std::logic_error inside another run; std::system_error without more threads.
  // Allocates nothing once the threads exist.
  template <class Body>
  void run(const Body& body) {
    dispatch([](const void* erased, Share share) { (*static_cast<const Body*>(erased))(share); },
             &body);
  }

  // Inside run: returns when every thread of the team has called it. What a thread wrote before is
  // seen by all of them after.
  void barrier();

 private:
  struct State;
  using Call = void (*)(const void* body, Share share);

  void dispatch(Call call, const void* body);

  std::unique_ptr<State> state_;
};

}  // namespace firstlm
