// The functions that are built once per instruction set, as a table; dispatch.cpp picks one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../dtype.h"
#include "../packed_matrix.h"

namespace firstlm {

// Rows that add_rows takes at once, so that the sums pass through L1 once for all of them.
inline constexpr int kRowsPerPass = 4;

// What add_rows prefetches meanwhile, a line for each line that it adds: what lies `bytes` after
// the rows, the next rows as a rule. Hardware does not follow streams this short.
struct RowsAhead {
  int64_t bytes;
  bool in_sequence;  // rows follow each other without gaps: fetched in that order, the fastest
};

// sums[i] += rows[0][i], then rows[1][i], … rows[count - 1][i], for i < width and count in
// [1, kRowsPerPass]. Rows are of the table index's type, sums of its accumulator's. Rows are added
// in their order, one by one, on every instruction set: sums depend neither on it nor on how rows
// are divided into calls.
using AddRows = void (*)(const void* const* rows, int count, int64_t width, RowsAhead ahead,
                         void* sums);

// Slots of the cache that decode attention takes at once, whatever the threads: results do not
// depend on their number.
inline constexpr int64_t kSlotsPerSplit = 256;

// Gates of an MLP that lie side by side, before the outputs that they gate.
inline constexpr int64_t kGateBlock = 16;

// head_dim rounded up so that vectors of every instruction set end with it.
constexpr int64_t padded_head_dim(int64_t D) { return (D + 15) / 16 * 16; }

// The query heads that share a key/value head, over some consecutive slots of the cache. Queries,
// maxima, totals and sums are of the accumulator's type.
struct AttentionSplit {
  int64_t G, D, slots;        // slots in [1, kSlotsPerSplit]
  int64_t next_slots;         // that follow them and are the next to be read, 0 if not known
  const void* queries;        // [G, padded D]; zeros beyond D
  const void *keys, *values;  // [slots, D] from the first slot on
  int64_t stride_keys;        // elements from slot to slot
  int64_t stride_values;      //
  double scale;               // of the scores
  double soft_cap;            // scores become cap * tanh(score / cap) if positive
  int64_t stride_totals;      // elements from query head to query head
  int64_t stride_sums;        //
  void* maxima;               // [G]: the greatest score
  void* totals;               // [G]: the sum of exp(score - maximum)
  void* sums;                 // [G, padded D]: the sum of values times exp(score - maximum)
};

// The splits of one query head, at least one.
struct SplitMerge {
  int64_t splits, D;
  void* maxima;        // [splits]; overwritten
  const void* totals;  // [splits]
  const void* sums;    // [splits, padded D]
  void* output;        // [D] of the table index's type
};

// Slots that prefill attention takes at once, whatever the threads; its running maxima move from
// one such block to the next.
inline constexpr int64_t kPrefillSlots = 96;

// Rows that it takes at once, at most, on any instruction set.
inline constexpr int64_t kMaxPrefillTile = 64;

// Floats of scratch for `rows` = tokens x G rows.
constexpr int64_t prefill_scratch_floats(int64_t rows, int64_t D) {
  return 2 * kPrefillSlots * padded_head_dim(D) + kPrefillSlots * kMaxPrefillTile +
         (rows + kMaxPrefillTile) * (2 + 2 * padded_head_dim(D));
}

// Consecutive tokens and the G query heads that share a key/value head.
struct PrefillBlock {
  int64_t tokens, G, D;
  const float* query;         // [tokens, G, D], heads D apart
  int64_t stride_T;           // of query and output: elements from token to token
  const void *keys, *values;  // [first + tokens, D] from the first slot that holds anything on
  int64_t first;              // slot of the first token; the others follow
  int64_t window;             // a token sees at most so many slots, itself included; > 0
  float scale;
  float* scratch;  // prefill_scratch_floats(tokens * G, D)
  float* output;   // as query
};

// Rows of `bytes` each, `inner` of them `outer` times. Strides are in bytes.
struct RowCopy {
  const char* from;
  int64_t from_outer, from_inner;
  char* to;
  int64_t to_outer, to_inner;
  int64_t outer, inner, bytes;
  bool past_caches;  // for more than caches hold: whole cache lines go straight to memory
};

// Tokens [first, last) of x [M, K] become what a product reads, see linear.h.
struct LinearInput {
  const float* x;
  int64_t stride_M;  // elements from token to token
  int64_t M, K;
  int64_t first, last;
  std::byte* to;
};

// Outputs of panels [first, last) for M tokens.
struct LinearProduct {
  PackedMatrix weights;
  const std::byte* input;
  int64_t M;
  int64_t first, last;
  float* y;          // [M, N]
  int64_t stride_y;  // elements from token to token
};

// What panels [first, last) of packed columns add to the outputs of M tokens.
struct ColumnsProduct {
  PackedColumns B;
  const float* z;    // [M, R]
  int64_t stride_z;  // elements from token to token
  int64_t M;
  int64_t first, last;
  float* y;          // [M, N]
  int64_t stride_y;  // elements from token to token
};

struct LinearKernels {
  int64_t (*token_bytes)(int64_t K);  // of a prepared token
  void (*prepare)(const LinearInput& input);
  void (*multiply)(const LinearProduct& product);
};

struct Kernels {
  const char* isa;

  AddRows add_rows[kNumDTypes];

  // to[i] = a[i] + gate * (b[i] - a[i]) for i < n, computed in the accumulator's type from the end
  // that is nearer: to[i] may be a[i] or b[i].
  void (*lerp[kNumDTypes])(const void* a, const void* b, double gate, int64_t n, void* to);

  // to[i] += from[i] for i < n, computed in the accumulator's type.
  void (*add[kNumDTypes])(const void* from, int64_t n, void* to);

  float (*dot_f32)(const float* a, const float* b, int64_t n);
  double (*dot_f64)(const double* a, const double* b, int64_t n);

  // Norm, rotation and activation: see elementwise.h.
  // to[i] = x[i] * scale * y[i] for i < n; `to` may be x or y.
  void (*scaled_product)(const float* x, const float* y, float scale, int64_t n, float* to);
  // (a[i], b[i]) become (a cos - b sin, b cos + a sin) for i < n.
  void (*rotate_pairs)(const float* cos, const float* sin, int64_t n, float* a, float* b);
  // gate_up [blocks, 2, kGateBlock] -> to [blocks, kGateBlock] = silu(gate) * up.
  void (*silu_and_multiply)(const float* gate_up, int64_t blocks, float* to);

  // The greatest of x [n], -inf of none; NaN if one of them is NaN or +inf.
  float (*maximum)(const float* x, int64_t n);
  // to[i] = exp(x[i] - shift) for i < n, 0 if x[i] is -inf. No x[i] may be above shift, or NaN.
  void (*exponentials)(const float* x, float shift, int64_t n, float* to);

  // Fast for rows that are too short for the price of a call of memcpy.
  void (*copy_rows)(const RowCopy& copy);

  // Keys and values are of the table index's type.
  void (*attend[kNumDTypes])(const AttentionSplit& split);

  // The weighted mean of the values of all splits.
  void (*merge_splits[kNumDTypes])(const SplitMerge& merge);

  // Keys and values are of the table index's type; none for f64. A token's output depends neither
  // on the other tokens of its block nor on where the block begins.
  void (*attend_tokens[kNumDTypes])(const PrefillBlock& block);

  LinearKernels linear[kNumPrecisions];
  void (*add_columns)(const ColumnsProduct& product);
};

// The best table of this machine, or the one that the environment variable FIRSTLM_ISA names;
// chosen once. Throws std::invalid_argument for a name that this machine or build does not have.
const Kernels& kernels();

// Every table that this machine can run, the portable one first, the best one last.
const std::vector<const Kernels*>& available_kernels();

// The table of that name; an empty name is the best one. Throws as kernels() does.
const Kernels& find_kernels(const std::string& isa);

}  // namespace firstlm
