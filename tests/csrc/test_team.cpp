// The team of threads: every share runs once, barriers hold, errors come back, a fork survives.
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "catch.h"
#include "team.h"

namespace firstlm {
namespace {

// Sums [0, count) over the threads, then the threads' sums on the last one.
int64_t sum_below(Team& team, int64_t count) {
  std::vector<int64_t> parts(team.size());
  int64_t total = 0;
  team.run([&](Share share) {
    const auto [first, last] = share.of(count);
    for (int64_t i = first; i < last; ++i) parts[share.rank] += i;
    team.barrier();
    if (share.rank == share.size - 1) {
      for (const int64_t part : parts) total += part;
    }
  });
  return total;
}

double cpu_seconds() {
  timespec used;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
  return used.tv_sec + used.tv_nsec * 1e-9;
}

TEST_CASE("team: shares cover a range in order and differ by one at most") {
  for (const int size : {1, 2, 7, 256}) {
    for (const int64_t count : {0, 1, 6, 7, 255, 256, 1000}) {
      int64_t next = 0;
      for (int rank = 0; rank < size; ++rank) {
        const auto [first, last] = Share{rank, size}.of(count);
        REQUIRE(first == next);
        REQUIRE(last - first >= count / size);
        REQUIRE(last - first <= count / size + 1);
        next = last;
      }
      REQUIRE(next == count);
    }
  }
}

TEST_CASE("team: every rank runs once, the caller is the first") {
  for (const int size : {1, 2, 7}) {
    Team team(size);
    CHECK(team.size() == size);
    for (int repeat = 0; repeat < 200; ++repeat) {
      std::vector<int> calls(size);
      std::thread::id first;
      std::atomic<int> sizes{0};
      team.run([&](Share share) {
        ++calls[share.rank];
        sizes += share.size;
        if (share.rank == 0) first = std::this_thread::get_id();
      });
      REQUIRE(calls == std::vector<int>(size, 1));
      REQUIRE(sizes == size * size);
      REQUIRE(first == std::this_thread::get_id());
    }
  }
}

TEST_CASE("team: no thread passes a barrier before all have come") {
  for (const int size : {1, 2, 7}) {
    Team team(size);
    const int phases = size > 2 ? 300 : 5000;
    std::vector<int> done(size);  // written by its rank alone, read by all: barriers order it
    std::atomic<int> early{0};
    for (int repeat = 0; repeat < 3; ++repeat) {
      std::fill(done.begin(), done.end(), 0);
      team.run([&](Share share) {
        for (int phase = 1; phase <= phases; ++phase) {
          done[share.rank] = phase;
          team.barrier();
          for (const int other : done) early += other != phase;
          team.barrier();
        }
      });
      REQUIRE(early == 0);
    }
  }
}

TEST_CASE("team: sizes that are refused") {
  for (const int size : {-1, 0, Team::kMaxSize + 1}) {
    CHECK_THROWS_AS(Team(size), std::invalid_argument);
  }
}

TEST_CASE("team: callers on several threads, of one team and of others") {
  Team shared(2), small(1), large(5);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      Team own(2 + caller);
      for (int64_t i = 0; i < 60; ++i) {
        for (Team* team : {&shared, &small, &large, &own}) {
          wrong += sum_below(*team, i) != i * (i - 1) / 2;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST_CASE("team: an exception reaches the caller, and the others leave their barriers") {
  for (const int size : {1, 2, 7}) {
    Team team(size);
    for (int thrower = 0; thrower < size; ++thrower) {
      for (const int at : {0, 1, 5}) {
        std::atomic<int> completed{0};
        const auto body = [&](Share share) {
          for (int phase = 0; phase < 10; ++phase) {
            if (share.rank == thrower && phase == at) throw std::runtime_error("no more");
            team.barrier();
          }
          ++completed;
        };
        CHECK_THROWS_WITH(team.run(body), "no more");
        CHECK(completed == 0);
        CHECK(sum_below(team, 100) == 4950);  // the team is whole again
      }
    }
    const auto all_throw = [](Share share) { throw std::out_of_range(std::to_string(share.rank)); };
    CHECK_THROWS_AS(team.run(all_throw), std::out_of_range);
    CHECK(sum_below(team, 10) == 45);
  }
}

TEST_CASE("team: a run inside a run is refused, not a deadlock") {
  for (const int size : {1, 3}) {
    Team team(size), other(2);
    CHECK_THROWS_AS(team.run([&](Share) { other.run([](Share) {}); }), std::logic_error);
    CHECK(sum_below(team, 10) == 45);
    CHECK(sum_below(other, 10) == 45);
  }
}

TEST_CASE("team: idle threads sleep") {
  Team team(4);
  CHECK(sum_below(team, 10) == 45);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(cpu_seconds() - before < 0.1);
  CHECK(sum_below(team, 10) == 45);
}

// The child's exit status is 0 if its own threads work.
int status_of_child(Team& team) {
  const pid_t child = fork();
  if (child == 0) _exit(sum_below(team, 100) == 4950 ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

TEST_CASE("team: a forked child has threads of its own", "[fork]") {
  Team team(3);
  CHECK(sum_below(team, 10) == 45);
  CHECK(status_of_child(team) == 0);

  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) sum_below(team, 1000);
  });
  for (int i = 0; i < 10; ++i) CHECK(status_of_child(team) == 0);  // in the middle of runs
  stop = true;
  other.join();
  CHECK(sum_below(team, 10) == 45);
}

}  // namespace
}  // namespace firstlm
