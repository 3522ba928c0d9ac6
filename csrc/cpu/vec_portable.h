// Vectors in plain C++, for machines without a better file and as the twin that the others are
// tested against. Include inside an anonymous namespace. This file says what every vec_*.h has.

template <class Scalar, class Bits, int kMantissaBits, int kWidth>
struct PortableVec {
  static constexpr int kLanes = kWidth;
  static constexpr int kRegisters = 16;  // vectors that the machine holds at once
  Scalar lane[kWidth];

  static PortableVec zero() { return PortableVec{}; }

  template <class T>
  static PortableVec load(const T* from) {
    PortableVec v;
    for (int i = 0; i < kWidth; ++i) v.lane[i] = widen(from[i]);
    return v;
  }

  // F32 only. Of kLanes pairs: their first elements, their second ones.
  static PortableVec load_first(const BFloat16* pairs) {
    PortableVec v;
    for (int i = 0; i < kWidth; ++i) v.lane[i] = widen(pairs[2 * i]);
    return v;
  }
  static PortableVec load_second(const BFloat16* pairs) { return load_first(pairs + 1); }

  static PortableVec broadcast(Scalar x) {
    PortableVec v;
    for (int i = 0; i < kWidth; ++i) v.lane[i] = x;
    return v;
  }

  template <class T>
  void store(T* to) const {
    for (int i = 0; i < kWidth; ++i) narrow(lane[i], to + i);
  }

  // F32 only. Integers that int8 holds.
  void store(int8_t* to) const {
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<int8_t>(lane[i]);
  }

  static PortableVec fma(PortableVec a, PortableVec b, PortableVec c) {
    for (int i = 0; i < kWidth; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }

  // The greater one; if either is NaN, b or NaN.
  static PortableVec max(PortableVec a, PortableVec b) {
    for (int i = 0; i < kWidth; ++i) b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return b;
  }

  // 2^k in each lane of shifted = kRoundingShift + k: what is added to a number to round it to an
  // integer k leaves k in the mantissa's last bits. 2^k must be a normal number.
  static constexpr Scalar kRoundingShift = Scalar(1.5) * (Bits(1) << kMantissaBits);
  static PortableVec power_of_two(PortableVec shifted) {
    for (int i = 0; i < kWidth; ++i) {
      const Scalar one = 1;
      Bits bits, bits_of_one;
      __builtin_memcpy(&bits, &shifted.lane[i], sizeof bits);
      __builtin_memcpy(&bits_of_one, &one, sizeof one);
      bits = (bits << kMantissaBits) + bits_of_one;
      __builtin_memcpy(&shifted.lane[i], &bits, sizeof bits);
    }
    return shifted;
  }

  // Copies as many bytes as a vector has to an address that is aligned to them, past the caches
  // where that is possible. Other threads may read them after end_streams().
  static void stream(const char* from, char* to) {
    __builtin_memcpy(to, from, sizeof(PortableVec));
  }
  static void end_streams() {}

  // to[i] = v[i].sum(), cheaper than four sums where lanes of several vectors can be added at once.
  static void store_sums(const PortableVec (&v)[4], Scalar* to) {
    for (int i = 0; i < 4; ++i) to[i] = v[i].sum();
  }

  Scalar sum() const {
    Scalar total = 0;
    for (int i = 0; i < kWidth; ++i) total += lane[i];
    return total;
  }

  // No NaNs.
  Scalar greatest() const {
    Scalar greatest = lane[0];
    for (int i = 1; i < kWidth; ++i) greatest = lane[i] > greatest ? lane[i] : greatest;
    return greatest;
  }

  friend PortableVec operator+(PortableVec a, PortableVec b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] += b.lane[i];
    return a;
  }

  friend PortableVec operator-(PortableVec a, PortableVec b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  friend PortableVec operator*(PortableVec a, PortableVec b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  friend PortableVec operator/(PortableVec a, PortableVec b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] /= b.lane[i];
    return a;
  }
};

using F32 = PortableVec<float, uint32_t, 23, 4>;
using F64 = PortableVec<double, uint64_t, 52, 2>;
