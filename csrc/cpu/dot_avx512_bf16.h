// Products of bf16 of AVX512_BF16: inputs are rounded to bf16. Include after linear-inl.h.

struct BFloat16PairLine {
  static constexpr Precision kPrecision = Precision::kBFloat16;
  static constexpr int kWords = 1;
  static constexpr int kSums = kSumRegisters;
  struct Weights {
    __m512bh v;
  };

  static Weights load(const char* line, int) {
    return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(line))};
  }
  static __m512bh broadcast(const char* word) {
    int32_t pair;
    __builtin_memcpy(&pair, word, 4);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static F32 fma(Weights w, __m512bh x, F32 sum) { return {_mm512_dpbf16_ps(sum.v, w.v, x)}; }

  static void prepare_token(const float* x, int64_t K, const TokenWords& to) {
    BFloat16 halves[F32::kLanes];
    for (int64_t k = 0; k < K; k += F32::kLanes) {
      const int64_t count = smaller(F32::kLanes, K - k);
      if (count == F32::kLanes) {
        F32::load(x + k).store(halves);
      } else {
        for (int64_t i = 0; i < count; ++i) narrow(x[k + i], halves + i);
        if (count % 2 != 0) halves[count].bits = 0;
      }
      to.from(k / 2).set_all(halves, ceil_div(count, 2));
    }
  }
};

using BFloat16PairLines = FloatFormat<BFloat16PairLine>;
