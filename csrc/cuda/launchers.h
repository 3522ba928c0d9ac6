// The CUDA kernels as functions of raw device pointers: no torch, no synchronisation, no
// allocation, so that every call can be captured in a CUDA graph. `stream` is a cudaStream_t;
// `scratch` is device memory of as many bytes as the function beside it says, at a multiple of 16.
// All throw std::runtime_error if a kernel cannot be started.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "../kv.h"
#include "../router.h"
#include "../rows.h"

namespace firstlm::cuda {

// As firstlm::router_pool.
int64_t router_pool_scratch(const HiddenStates& hidden, Pooling pooling);
void router_pool(const HiddenStates& hidden, const bool* prompt_mask, Pooling pooling,
                 void* scratch, void* pooled, void* stream);

// As firstlm::router_pool_backward.
int64_t router_pool_backward_scratch(const HiddenStates& hidden);
void router_pool_backward(const HiddenStates& hidden, const bool* prompt_mask, Pooling pooling,
                          const void* grad_pooled, void* scratch, void* grad_hidden, void* stream);

// As firstlm::router_pool_packed and its adjoint. Offsets that do not rise from 0 to N give
// features that mean nothing; nothing outside of the arguments is touched.
int64_t router_pool_packed_scratch(const PackedStates& hidden, Pooling pooling);
void router_pool_packed(const PackedStates& hidden, Pooling pooling, void* scratch, void* pooled,
                        void* stream);
void router_pool_packed_backward(const PackedStates& hidden, Pooling pooling,
                                 const void* grad_pooled, void* grad_hidden, void* stream);

// As firstlm::router_head; `units` is scratch there, too.
template <class T>
void router_head(const RouterHead<T>& head, const T* pooled, int64_t B, T* units, T* logit,
                 void* stream);

// As firstlm::kv_append; rows whose start lies outside [0, C - T] are not written.
void kv_append(const NewTokens& keys, const NewTokens& values, const int64_t* start, void* stream);

// As firstlm::plan_rows.
void plan_rows(const bool* keep_mask, int64_t B, int64_t L, int64_t* rows, int64_t* counts,
               void* stream);

// As the functions of these names in firstlm, on a batch of B rows; `out` is contiguous. What names
// no row of the batch is taken for -1. Rows that two values go to hold one of them, in place a
// mixture.
void gather_rows(ConstRows hidden, int64_t B, const int64_t* rows, int64_t R, int64_t row_bytes,
                 void* out, void* stream);
void scatter_rows(ConstRows hidden, int64_t B, const RowUpdate& update, RowSize size, void* out,
                  void* stream);
void scatter_rows_in_place(Rows hidden, int64_t B, const RowUpdate& update, RowSize size,
                           void* stream);
void scatter_add_rows(Rows hidden, int64_t B, const int64_t* rows, int64_t R, ConstRows update,
                      RowSize size, void* stream);

// As firstlm::decode_attention; rows see those of their slots that exist.
int64_t decode_attention_scratch(const DecodeAttention& attention);
void decode_attention(const DecodeAttention& attention, void* scratch, void* output, void* stream);

}  // namespace firstlm::cuda
