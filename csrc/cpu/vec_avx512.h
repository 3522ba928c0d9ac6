// Vectors of AVX-512 (F, BW, DQ, VL). Include inside an anonymous namespace, <immintrin.h> before.

struct F32 {
  static constexpr int kLanes = 16;
  __m512 v;

  static F32 zero() { return {_mm512_setzero_ps()}; }
  static F32 load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static F32 load(const BFloat16* from) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16_bit(from)), 16))};
  }
  static F32 load(const Float16* from) { return {_mm512_cvtph_ps(load_16_bit(from))}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }

  static F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }

 private:
  static __m256i load_16_bit(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
};

struct F64 {
  static constexpr int kLanes = 8;
  __m512d v;

  static F64 zero() { return {_mm512_setzero_pd()}; }
  static F64 load(const double* from) { return {_mm512_loadu_pd(from)}; }
  void store(double* to) const { _mm512_storeu_pd(to, v); }

  static F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
  double sum() const { return _mm512_reduce_add_pd(v); }
};
