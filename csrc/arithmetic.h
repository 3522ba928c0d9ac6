// Small arithmetic that the CPU and the CUDA kernels share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FIRSTLM_HOST_DEVICE __host__ __device__
#else
#define FIRSTLM_HOST_DEVICE
#endif

namespace firstlm {

// Asks for a line that is read soon, into L2 only: a core has few reads of memory into L1 under way
// (on a Zen 4 half as many bytes a second), and what L2 has comes in time.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

FIRSTLM_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

FIRSTLM_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FIRSTLM_HOST_DEVICE constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

}  // namespace firstlm
