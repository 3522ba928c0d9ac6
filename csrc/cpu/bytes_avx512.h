// Bytes in 32-bit lanes, of AVX-512 (F, BW): what both dot_avx512*.h share. Include after
// vec_avx512.h.

struct I32 {
  __m512i v;

  static I32 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  F32 to_f32() const { return {_mm512_cvtepi32_ps(v)}; }
};

struct Int8Inputs {
  __m512i v;

  static Int8Inputs broadcast(const void* four_bytes) {
    int32_t word;
    __builtin_memcpy(&word, four_bytes, 4);
    return {_mm512_set1_epi32(word)};
  }
};

struct Int4Weights {
  __m512i low, high;

  static Int4Weights load(const void* from) {
    const __m512i packed = _mm512_loadu_si512(from);
    const __m512i mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(packed, mask), _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask)};
  }
};
