// Dot products of four bytes in each lane, of Armv8.2 (sdot). Include after vec_neon.h.

struct I32 {
  int32x4_t v;

  static I32 broadcast(int32_t x) { return {vdupq_n_s32(x)}; }
  F32 to_f32() const { return {vcvtq_f32_s32(v)}; }
};

struct Int8Inputs {
  int8x16_t v;

  static Int8Inputs broadcast(const void* four_bytes) {
    int32_t word;
    __builtin_memcpy(&word, four_bytes, 4);
    return {vreinterpretq_s8_s32(vdupq_n_s32(word))};
  }
};

struct Int8Weights {
  static constexpr int32_t kOffset = 0;
  static constexpr bool kUnrolled = false;
  int8x16_t v;

  static Int8Weights load(const void* from) { return {vld1q_s8(static_cast<const int8_t*>(from))}; }
  I32 dot(Int8Inputs x, I32 sum) const { return {vdotq_s32(sum.v, v, x.v)}; }
};

struct Int4Weights {
  int8x16_t low, high;

  static Int4Weights load(const void* from) {
    const uint8x16_t packed = vld1q_u8(static_cast<const uint8_t*>(from));
    return {vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15))),
            vreinterpretq_s8_u8(vshrq_n_u8(packed, 4))};
  }
};

struct Int4Sum {
  int32x4_t v;

  static Int4Sum zero() { return {vdupq_n_s32(0)}; }
  void add(const Int4Weights& w, Int8Inputs low, Int8Inputs high) {
    v = vdotq_s32(v, w.low, low.v);
    v = vdotq_s32(v, w.high, high.v);
  }
  I32 total() const { return {v}; }
};
