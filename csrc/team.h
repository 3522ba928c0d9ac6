// Threads that run one body side by side and meet at barriers: a token is one run of a team.
#pragma once

#include <cstdint>
#include <functional>
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

// The calling thread and size - 1 threads of the process's own team. Runs of several callers queue.
// Waiting threads spin briefly, then yield, then sleep.
class Team {
 public:
  explicit Team(int size);  // std::invalid_argument unless in [1, 256]
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const;

  // Calls body(share) once on each thread, and returns when all have returned. The first exception
  // that a body throws is thrown again here, after the others have ended (they leave their
  // barriers).
  void run(const std::function<void(Share)>& body);

  // Inside run: returns when every thread of the team has called it.
  void barrier();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace firstlm
