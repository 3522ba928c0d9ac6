// Dot products of four bytes in each lane, of AVX-512 VNNI. Include after
// bytes_avx512.h.

struct Int8Weights {
  static constexpr int32_t kOffset = 128;  // the instruction takes unsigned bytes
  // A loop's end would copy every sum: the compiler gives the instruction registers of its own.
  static constexpr bool kUnrolled = true;
  __m512i v;

  static Int8Weights load(const void* from) {
    const __m512i signs = _mm512_set1_epi8(static_cast<char>(0x80));
    return {_mm512_xor_si512(_mm512_loadu_si512(from), signs)};
  }
  I32 dot(Int8Inputs x, I32 sum) const { return {_mm512_dpbusd_epi32(sum.v, v, x.v)}; }
};

struct Int4Sum {
  __m512i v;

  static Int4Sum zero() { return {_mm512_setzero_si512()}; }
  void add(const Int4Weights& w, Int8Inputs low, Int8Inputs high) {
    v = _mm512_dpbusd_epi32(v, w.low, low.v);
    v = _mm512_dpbusd_epi32(v, w.high, high.v);
  }
  I32 total() const { return {v}; }
};
