// Vectors of AVX-512 (F, BW, DQ, VL). Include inside an anonymous namespace, <immintrin.h> before.

struct F32 {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static constexpr float kRoundingShift = 0x1.8p23f;
  __m512 v;

  static F32 zero() { return {_mm512_setzero_ps()}; }
  static F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static F32 load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static F32 load(const BFloat16* from) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16_bit(from)), 16))};
  }
  static F32 load(const Float16* from) { return {_mm512_cvtph_ps(load_16_bit(from))}; }
  // Of kLanes pairs: their first elements, their second ones.
  static F32 load_first(const BFloat16* pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16))};
  }
  static F32 load_second(const BFloat16* pairs) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(pairs), high))};
  }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(BFloat16* to) const {
    // As narrow(): to nearest, ties to even, and NaNs stay NaNs.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
    store_16_bit(to, _mm512_cvtepi32_epi16(high));
  }
  void store(Float16* to) const {
    store_16_bit(to, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }

  static F32 power_of_two(F32 shifted) {
    const __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
    const __m512i one = _mm512_castps_si512(_mm512_set1_ps(1));
    return {_mm512_castsi512_ps(_mm512_add_epi32(bits, one))};
  }

  static void store_sums(const F32 (&v)[4], float* to) {
    // Shuffles within 128 bits run beside fmas, those across compete with them.
    const __m512 ab = pairs_added(v[0].v, v[1].v), cd = pairs_added(v[2].v, v[3].v);
    const __m512 x =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
  }

  // Integers that int8 holds.
  void store(int8_t* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  float sum() const { return _mm512_reduce_add_ps(v); }
  float greatest() const { return _mm512_reduce_max_ps(v); }

  static void stream(const char* from, char* to) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
  static void end_streams() { _mm_sfence(); }

 private:
  // In 128 bits each: the lower half of a plus its upper half, then b's.
  static __m512 pairs_added(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_mask_mov_ps(a, 0xcccc, b), _mm512_shuffle_ps(a, b, 0x4e));
  }
  static __m256i load_16_bit(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static void store_16_bit(void* to, __m256i x) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), x);
  }
};

struct F64 {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 32;
  static constexpr double kRoundingShift = 0x1.8p52;
  __m512d v;

  static F64 zero() { return {_mm512_setzero_pd()}; }
  static F64 broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static F64 load(const double* from) { return {_mm512_loadu_pd(from)}; }
  void store(double* to) const { _mm512_storeu_pd(to, v); }

  static F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
  friend F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }

  static F64 power_of_two(F64 shifted) {
    const __m512i bits = _mm512_slli_epi64(_mm512_castpd_si512(shifted.v), 52);
    const __m512i one = _mm512_castpd_si512(_mm512_set1_pd(1));
    return {_mm512_castsi512_pd(_mm512_add_epi64(bits, one))};
  }

  static void store_sums(const F64 (&v)[4], double* to) {
    for (int i = 0; i < 4; ++i) to[i] = v[i].sum();
  }

  double sum() const { return _mm512_reduce_add_pd(v); }
  double greatest() const { return _mm512_reduce_max_pd(v); }
};
