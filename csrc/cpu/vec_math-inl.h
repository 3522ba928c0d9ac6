// Elementary functions over F32 and F64 of a vec_*.h, to within a few units in the last place.
// Include after it, inside the same anonymous namespace.

// The vectors that elements of T are computed with.
template <class T>
struct VecOf {
  using type = F32;
};
template <>
struct VecOf<double> {
  using type = F64;
};

template <class Vec>
struct MathOf;

template <>
struct MathOf<F32> {
  using Scalar = float;
  static constexpr float kLowest = -3.402823466e38f;
  static constexpr float kMinExponent = -87.0f;  // exp of less is close to the smallest normal
  static constexpr float kMaxTanh = 10.0f;       // tanh of more is 1
  static constexpr int kTerms = 7;               // of the series of exp(r) - 1, |r| <= ln(2) / 2
  // ln(2) in two parts, the first so short that its product with an exponent is exact.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440054690583e-4f;
};

template <>
struct MathOf<F64> {
  using Scalar = double;
  static constexpr double kLowest = -1.7976931348623157e308;
  static constexpr double kMinExponent = -708.0;
  static constexpr double kMaxTanh = 20.0;
  static constexpr int kTerms = 13;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
};

// x = k ln(2) + r: 2^k and exp(r) - 1. x must lie where 2^k is a normal number.
template <class Vec>
void split_exponential(Vec x, Vec* power, Vec* rest) {
  using Math = MathOf<Vec>;
  using Scalar = typename Math::Scalar;
  constexpr Scalar kLog2E = Scalar(1.442695040888963407);
  const Vec shift = Vec::broadcast(Vec::kRoundingShift);
  const Vec shifted = Vec::fma(x, Vec::broadcast(kLog2E), shift);
  const Vec minus_k = shift - shifted;
  Vec r = Vec::fma(minus_k, Vec::broadcast(Math::kLn2High), x);
  r = Vec::fma(minus_k, Vec::broadcast(Math::kLn2Low), r);

  // r + r²(1/2! + r(1/3! + …)): nothing is lost where the result is close to 0.
  Scalar factorial = 1;
  for (int n = 2; n <= Math::kTerms; ++n) factorial *= n;
  Vec series = Vec::broadcast(1 / factorial);
  for (int n = Math::kTerms; n > 2; --n) {
    factorial /= n;
    series = Vec::fma(series, r, Vec::broadcast(1 / factorial));
  }
  *rest = Vec::fma(r * r, series, r);
  *power = Vec::power_of_two(shifted);
}

// exp(x) for x <= 0; about 1e-38 (1e-307) instead of less. NaN gives NaN.
template <class Vec>
Vec exp_of_nonpositive(Vec x) {
  Vec power, rest;
  split_exponential(Vec::max(Vec::broadcast(MathOf<Vec>::kMinExponent), x), &power, &rest);
  return Vec::fma(power, rest, power);
}

template <class Vec>
Vec tanh(Vec x) {
  using Math = MathOf<Vec>;
  const Vec bound = Vec::broadcast(Math::kMaxTanh);
  x = Vec::max(Vec::zero() - bound, x);
  x = Vec::zero() - Vec::max(Vec::zero() - bound, Vec::zero() - x);
  Vec power, rest;
  split_exponential(x + x, &power, &rest);
  // expm1(2x) / (expm1(2x) + 2)
  const Vec expm1 = Vec::fma(power, rest, power - Vec::broadcast(1));
  return expm1 / (expm1 + Vec::broadcast(2));
}
