// The core's one way to use several threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace firstlm {

// As many threads as the work feeds: waking one costs about as long as reading this many bytes.
inline int threads_for(int64_t bytes, int max_threads) {
  constexpr int64_t kBytesPerThread = 128 * 1024;
  return static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, max_threads));
}

// Calls body(i) once for every i in [0, count). Items are handed out as threads come free, so a
// result may depend on i but not on the thread. Built by gcc it runs on the team that torch uses
// (both are libgomp's), so the two never compete for the cores; inside another parallel region it
// runs serially.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads <= 1 || count <= 1) {  // even a team of one has its price
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace firstlm
