// Dot products of four bytes in each lane, of AVX2. Include after vec_avx2.h.

struct I32 {
  __m256i v;

  static I32 broadcast(int32_t x) { return {_mm256_set1_epi32(x)}; }
  F32 to_f32() const { return {_mm256_cvtepi32_ps(v)}; }
};

struct Int8Inputs {
  __m256i v;

  static Int8Inputs broadcast(const void* four_bytes) {
    int32_t word;
    __builtin_memcpy(&word, four_bytes, 4);
    return {_mm256_set1_epi32(word)};
  }
};

struct Int8Weights {
  static constexpr int32_t kOffset = 0;
  static constexpr bool kUnrolled = false;
  __m256i signs, magnitudes;  // the weights themselves, for their signs

  static Int8Weights load(const void* from) {
    const __m256i w = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    return {w, _mm256_abs_epi8(w)};
  }
  I32 dot(Int8Inputs x, I32 sum) const {
    // Two products of at most 127 * 127 fit 16 bits.
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x.v, signs));
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
};

struct Int4Weights {
  __m256i low, high;

  static Int4Weights load(const void* from) {
    const __m256i packed = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(packed, mask), _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask)};
  }
};

struct Int4Sum {
  __m256i pairs;  // in 16 bits: 16 products of at most 15 * 127

  static Int4Sum zero() { return {_mm256_setzero_si256()}; }
  void add(const Int4Weights& w, Int8Inputs low, Int8Inputs high) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w.low, low.v));
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w.high, high.v));
  }
  I32 total() const { return {_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))}; }
};
