#include <cmath>
#include <limits>

#include "catch.h"
#include "dtype.h"

namespace firstlm {
namespace {

// What the bits of a 16-bit float with these fields mean, from the definition.
double value_of(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  const double fraction = std::ldexp(mantissa, -mantissa_bits) + (exponent ? 1 : 0);
  return sign * std::ldexp(fraction, (exponent ? exponent : 1) - bias);
}

template <class T>
void check_every_value(int exponent_bits, int mantissa_bits) {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T half{static_cast<uint16_t>(bits)};
    const double expected = value_of(half.bits, exponent_bits, mantissa_bits);
    const double actual = widen(half);
    T back;
    narrow(widen(half), &back);
    if (std::isnan(expected)) {
      wrong += !std::isnan(actual) || !std::isnan(widen(back));
    } else {
      wrong += actual != expected || std::signbit(actual) != std::signbit(expected);
      wrong += back.bits != half.bits;
    }
  }
  CHECK(wrong == 0);
}

// Between two neighbours: the nearer one, and the even one from the middle.
template <class T>
void check_rounding() {
  int wrong = 0;
  for (uint32_t bits = 0; bits + 1 < 0x8000; ++bits) {
    const T low{static_cast<uint16_t>(bits)}, high{static_cast<uint16_t>(bits + 1)};
    const float a = widen(low), b = widen(high);
    if (!std::isfinite(a) || !std::isfinite(b)) continue;
    const float middle = static_cast<float>((static_cast<double>(a) + b) / 2);
    const T even = bits % 2 ? high : low;
    T rounded;
    narrow(middle, &rounded);
    wrong += rounded.bits != even.bits;
    narrow(std::nextafter(middle, a), &rounded);
    wrong += rounded.bits != low.bits;
    narrow(-std::nextafter(middle, b), &rounded);
    wrong += rounded.bits != (high.bits | 0x8000);
  }
  CHECK(wrong == 0);
}

TEST_CASE("every bfloat16 becomes the float that it denotes, and back") {
  check_every_value<BFloat16>(8, 7);
}

TEST_CASE("every float16 becomes the float that it denotes, and back") {
  check_every_value<Float16>(5, 10);
}

TEST_CASE("floats round to the nearest bfloat16, ties to even") { check_rounding<BFloat16>(); }

TEST_CASE("floats round to the nearest float16, ties to even") { check_rounding<Float16>(); }

TEST_CASE("floats beyond the range become infinite") {
  Float16 half;
  narrow(65520.0f, &half);
  CHECK(std::isinf(widen(half)));
  narrow(65519.0f, &half);
  CHECK(widen(half) == 65504.0f);
  BFloat16 brain;
  narrow(std::numeric_limits<float>::max(), &brain);
  CHECK(std::isinf(widen(brain)));
}

}  // namespace
}  // namespace firstlm
