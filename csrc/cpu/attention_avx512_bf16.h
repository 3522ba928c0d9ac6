// Decode attention over bf16 of AVX512_BF16: products of pairs, without widening. Include after
// attention-inl.h.

// Keys as they are; queries are of bf16 too.
struct Pairs {
  using Query = BFloat16;
  static constexpr int kElements = 2 * F32::kLanes;

  static __m512bh load(const BFloat16* from) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
  }
  static F32 fma(__m512bh key, __m512bh query, F32 sum) {
    return {_mm512_dpbf16_ps(sum.v, key, query)};
  }
};

// Whether bf16 holds x [n] exactly, n in whole vectors, which are then narrowed.
bool narrow_exactly(const float* x, int64_t n, BFloat16* to) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  __mmask16 wider = 0;
  for (int64_t i = 0; i < n; i += F32::kLanes) {
    const __m512i bits = _mm512_loadu_si512(x + i);
    wider |= _mm512_test_epi32_mask(bits, low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
  return wider == 0;
}

// Queries that bf16 holds, those that the cache's type has been given for, lose nothing in pairs;
// others are multiplied in f32.
void attend_in_pairs(const AttentionSplit& split) {
  constexpr int64_t kMaxHeadDim = 256;  // of the queries on the stack
  if (split.D % Pairs::kElements != 0 || split.D > kMaxHeadDim) return attend<BFloat16>(split);
  for_each_chunk(split, [&](int64_t g, int64_t heads) {
    const float* queries = static_cast<const float*>(split.queries) + g * split.D;
    BFloat16 narrowed[kHeadsPerChunk * kMaxHeadDim];
    if (narrow_exactly(queries, heads * split.D, narrowed)) {
      attend_chunk<BFloat16, Pairs>(split, g, heads, narrowed);
    } else {
      attend_chunk<BFloat16, Widened<BFloat16>>(split, g, heads, queries);
    }
  });
}
