// Element types of the tensors that the core reads and writes.
#pragma once

#include <cstdint>
#include <cstring>

namespace firstlm {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
inline constexpr int kNumDTypes = 4;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Sums are f64 for f64 elements and f32 for all others.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Files compiled for one instruction set include this header. Their copies of these functions must
// not be shared with the portable files by the linker, hence the internal linkage.
namespace {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }

inline double widen(double x) { return x; }

inline float widen(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // Subnormals: let the subtraction of 0.5 normalise mantissa * 2^-24.
  const float subnormal = bits_float(magnitude | (126u << 23)) - 0.5f;
  // The others: move the exponent's bias by 224 too much, so that the product by 2^-112 brings
  // normals to their place and leaves infinities and NaNs what they are.
  const float normal = bits_float((magnitude << 13) + (0xe0u << 23)) * 0x1p-112f;
  return bits_float(sign | float_bits(magnitude < 0x0400u ? subnormal : normal));
}

inline void narrow(float x, float* to) { *to = x; }

inline void narrow(double x, double* to) { *to = x; }

// Both round to nearest, ties to even.
inline void narrow(float x, BFloat16* to) {
  const uint32_t bits = float_bits(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u
                                          : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline void narrow(float x, Float16* to) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t doubled = bits + bits;  // the sign shifted out
  // Two products round overflows to infinity; adding a power of two that is 2^13 times the last
  // place kept makes the float addition round the mantissa to 10 bits (fewer for subnormals).
  float rounded = (bits_float(bits ^ sign) * 0x1p+112f) * 0x1p-110f;
  uint32_t bias = doubled & 0xff000000u;
  if (bias < 0x71000000u) bias = 0x71000000u;
  rounded += bits_float((bias >> 1) + 0x07800000u);
  const uint32_t magnitude =
      ((float_bits(rounded) >> 13) & 0x7c00u) + (float_bits(rounded) & 0x0fffu);
  to->bits = static_cast<uint16_t>((sign >> 16) | (doubled > 0xff000000u ? 0x7e00u : magnitude));
}

// Bytes of one element.
inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    default:
      return 2;
  }
}

// Calls body with a value of the C++ type that `dtype` names; only its type says anything.
template <class Body>
void with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

}  // namespace
}  // namespace firstlm
