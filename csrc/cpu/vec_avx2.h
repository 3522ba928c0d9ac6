// Vectors of AVX2 with FMA and F16C. Include inside an anonymous namespace, <immintrin.h> before.

struct F32 {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static constexpr float kRoundingShift = 0x1.8p23f;
  __m256 v;

  static F32 zero() { return {_mm256_setzero_ps()}; }
  static F32 broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static F32 load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static F32 load(const BFloat16* from) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bit(from)), 16))};
  }
  static F32 load(const Float16* from) { return {_mm256_cvtph_ps(load_16_bit(from))}; }
  // Of kLanes pairs: their first elements, their second ones.
  static F32 load_first(const BFloat16* pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(load_256_bits(pairs), 16))};
  }
  static F32 load_second(const BFloat16* pairs) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(load_256_bits(pairs), high))};
  }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store(BFloat16* to) const {
    // As narrow(): to nearest, ties to even, and NaNs stay NaNs.
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);  // each half of 128 bits by itself
    store_16_bit(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
  }
  void store(Float16* to) const {
    store_16_bit(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }

  static F32 power_of_two(F32 shifted) {
    const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
    const __m256i one = _mm256_castps_si256(_mm256_set1_ps(1));
    return {_mm256_castsi256_ps(_mm256_add_epi32(bits, one))};
  }

  static void store_sums(const F32 (&v)[4], float* to) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(v[0].v, v[1].v), _mm256_hadd_ps(v[2].v, v[3].v));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
  }

  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  float greatest() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  // Integers that int8 holds.
  void store(int8_t* to) const {
    const __m256i x = _mm256_cvtps_epi32(v);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }

  static void stream(const char* from, char* to) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bytes);
  }
  static void end_streams() { _mm_sfence(); }

 private:
  static __m256i load_256_bits(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static __m128i load_16_bit(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static void store_16_bit(void* to, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(to), x); }
};

struct F64 {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  static constexpr double kRoundingShift = 0x1.8p52;
  __m256d v;

  static F64 zero() { return {_mm256_setzero_pd()}; }
  static F64 broadcast(double x) { return {_mm256_set1_pd(x)}; }
  static F64 load(const double* from) { return {_mm256_loadu_pd(from)}; }
  void store(double* to) const { _mm256_storeu_pd(to, v); }

  static F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
  friend F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }

  static F64 power_of_two(F64 shifted) {
    const __m256i bits = _mm256_slli_epi64(_mm256_castpd_si256(shifted.v), 52);
    const __m256i one = _mm256_castpd_si256(_mm256_set1_pd(1));
    return {_mm256_castsi256_pd(_mm256_add_epi64(bits, one))};
  }

  static void store_sums(const F64 (&v)[4], double* to) {
    for (int i = 0; i < 4; ++i) to[i] = v[i].sum();
  }

  double sum() const {
    const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
  }
  double greatest() const {
    const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
  }
};
