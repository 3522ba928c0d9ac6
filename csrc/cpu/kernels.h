// The functions that are built once per instruction set, as a table; dispatch.cpp picks one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../dtype.h"

namespace firstlm {

// Rows that add_rows takes at once, so that the sums pass through L1 once for all of them.
inline constexpr int kRowsPerPass = 4;

struct Kernels {
  const char* isa;

  // sums[i] += rows[0][i] + … + rows[count - 1][i] for i < width and count in [1, kRowsPerPass].
  // Rows are of the table index's type, sums of its accumulator's. The order of additions is
  // the same on every instruction set, and so are the sums. What lies `ahead` bytes after the rows,
  // the next rows as a rule, is prefetched: hardware does not follow streams this short.
  void (*add_rows[kNumDTypes])(const void* const* rows, int count, int64_t width, int64_t ahead,
                               void* sums);

  // to[i] = a[i] + gate * (b[i] - a[i]) for i < n, computed in the accumulator's type from the end
  // that is nearer: to[i] may be a[i] or b[i].
  void (*lerp[kNumDTypes])(const void* a, const void* b, double gate, int64_t n, void* to);

  // to[i] += from[i] for i < n, computed in the accumulator's type.
  void (*add[kNumDTypes])(const void* from, int64_t n, void* to);

  float (*dot_f32)(const float* a, const float* b, int64_t n);
  double (*dot_f64)(const double* a, const double* b, int64_t n);
};

// The best table of this machine, or the one that the environment variable FIRSTLM_ISA names;
// chosen once. Throws std::invalid_argument for a name that this machine or build does not have.
const Kernels& kernels();

// Every table that this machine can run, the portable one first, the best one last.
const std::vector<const Kernels*>& available_kernels();

// The table of that name; an empty name is the best one. Throws as kernels() does.
const Kernels& find_kernels(const std::string& isa);

}  // namespace firstlm
