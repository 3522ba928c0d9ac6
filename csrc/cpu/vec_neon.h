// Vectors of Armv8 NEON. Include inside an anonymous namespace, <arm_neon.h> before.

struct F32 {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;
  static constexpr float kRoundingShift = 0x1.8p23f;
  float32x4_t v;

  static F32 zero() { return {vdupq_n_f32(0)}; }
  static F32 broadcast(float x) { return {vdupq_n_f32(x)}; }
  static F32 load(const float* from) { return {vld1q_f32(from)}; }
  static F32 load(const BFloat16* from) {
    return {vreinterpretq_f32_u32(vshll_n_u16(load_16_bit(from), 16))};
  }
  static F32 load(const Float16* from) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(load_16_bit(from)))};
  }
  // Of kLanes pairs: their first elements, their second ones.
  static F32 load_first(const BFloat16* pairs) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(load_128_bits(pairs), 16))};
  }
  static F32 load_second(const BFloat16* pairs) {
    return {vreinterpretq_f32_u32(vandq_u32(load_128_bits(pairs), vdupq_n_u32(0xffff0000u)))};
  }
  void store(float* to) const { vst1q_f32(to, v); }
  void store(BFloat16* to) const {
    // As narrow(): to nearest, ties to even, and NaNs stay NaNs.
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t is_number = vceqq_f32(v, v);
    store_16_bit(to, vshrn_n_u32(vbslq_u32(is_number, rounded, quiet), 16));
  }
  void store(Float16* to) const { store_16_bit(to, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

  static F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static F32 max(F32 a, F32 b) { return {vmaxq_f32(a.v, b.v)}; }
  friend F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
  friend F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
  friend F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
  friend F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }

  static F32 power_of_two(F32 shifted) {
    const int32x4_t bits = vshlq_n_s32(vreinterpretq_s32_f32(shifted.v), 23);
    const int32x4_t one = vreinterpretq_s32_f32(vdupq_n_f32(1));
    return {vreinterpretq_f32_s32(vaddq_s32(bits, one))};
  }

  static void store_sums(const F32 (&v)[4], float* to) {
    vst1q_f32(to, vpaddq_f32(vpaddq_f32(v[0].v, v[1].v), vpaddq_f32(v[2].v, v[3].v)));
  }

  float sum() const { return vaddvq_f32(v); }
  float greatest() const { return vmaxvq_f32(v); }

  // Integers that int8 holds.
  void store(int8_t* to) const {
    const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(v));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    __builtin_memcpy(to, &bytes, 4);
  }

  static void stream(const char* from, char* to) { __builtin_memcpy(to, from, sizeof(F32)); }
  static void end_streams() {}

 private:
  static uint32x4_t load_128_bits(const void* from) {
    return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(from)));
  }
  static uint16x4_t load_16_bit(const void* from) {
    return vld1_u16(static_cast<const uint16_t*>(from));
  }
  static void store_16_bit(void* to, uint16x4_t x) { vst1_u16(static_cast<uint16_t*>(to), x); }
};

struct F64 {
  static constexpr int kLanes = 2;
  static constexpr int kRegisters = 32;
  static constexpr double kRoundingShift = 0x1.8p52;
  float64x2_t v;

  static F64 zero() { return {vdupq_n_f64(0)}; }
  static F64 broadcast(double x) { return {vdupq_n_f64(x)}; }
  static F64 load(const double* from) { return {vld1q_f64(from)}; }
  void store(double* to) const { vst1q_f64(to, v); }

  static F64 fma(F64 a, F64 b, F64 c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
  static F64 max(F64 a, F64 b) { return {vmaxq_f64(a.v, b.v)}; }
  friend F64 operator+(F64 a, F64 b) { return {vaddq_f64(a.v, b.v)}; }
  friend F64 operator-(F64 a, F64 b) { return {vsubq_f64(a.v, b.v)}; }
  friend F64 operator*(F64 a, F64 b) { return {vmulq_f64(a.v, b.v)}; }
  friend F64 operator/(F64 a, F64 b) { return {vdivq_f64(a.v, b.v)}; }

  static F64 power_of_two(F64 shifted) {
    const int64x2_t bits = vshlq_n_s64(vreinterpretq_s64_f64(shifted.v), 52);
    const int64x2_t one = vreinterpretq_s64_f64(vdupq_n_f64(1));
    return {vreinterpretq_f64_s64(vaddq_s64(bits, one))};
  }

  static void store_sums(const F64 (&v)[4], double* to) {
    for (int i = 0; i < 4; ++i) to[i] = v[i].sum();
  }

  double sum() const { return vaddvq_f64(v); }
  double greatest() const { return vmaxvq_f64(v); }
};
