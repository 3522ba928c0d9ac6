// Dot products of four bytes in each lane, of AVX-512 (F, BW). Include after
// bytes_avx512.h.

struct Int8Weights {
  static constexpr int32_t kOffset = 0;
  static constexpr bool kUnrolled = false;
  __m512i magnitudes;
  __mmask64 negative;

  static Int8Weights load(const void* from) {
    const __m512i w = _mm512_loadu_si512(from);
    return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
  }
  I32 dot(Int8Inputs x, I32 sum) const {
    // Two products of at most 127 * 127 fit 16 bits.
    const __m512i signed_x = _mm512_mask_sub_epi8(x.v, negative, _mm512_setzero_si512(), x.v);
    const __m512i pairs = _mm512_maddubs_epi16(magnitudes, signed_x);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  }
};

struct Int4Sum {
  __m512i pairs;  // in 16 bits: 16 products of at most 15 * 127

  static Int4Sum zero() { return {_mm512_setzero_si512()}; }
  void add(const Int4Weights& w, Int8Inputs low, Int8Inputs high) {
    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(w.low, low.v));
    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(w.high, high.v));
  }
  I32 total() const { return {_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))}; }
};
