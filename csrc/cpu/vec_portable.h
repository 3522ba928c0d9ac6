// Vectors in plain C++, for machines without a better file and as the twin that the others are
// tested against. Include inside an anonymous namespace.

template <class Scalar, int kWidth>
struct PortableVec {
  static constexpr int kLanes = kWidth;
  Scalar lane[kWidth];

  static PortableVec zero() { return PortableVec{}; }

  template <class T>
  static PortableVec load(const T* from) {
    PortableVec v;
    for (int i = 0; i < kWidth; ++i) v.lane[i] = widen(from[i]);
    return v;
  }

  static PortableVec broadcast(Scalar x) {
    PortableVec v;
    for (int i = 0; i < kWidth; ++i) v.lane[i] = x;
    return v;
  }

  template <class T>
  void store(T* to) const {
    for (int i = 0; i < kWidth; ++i) narrow(lane[i], to + i);
  }

  static PortableVec fma(PortableVec a, PortableVec b, PortableVec c) {
    for (int i = 0; i < kWidth; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }

  Scalar sum() const {
    Scalar total = 0;
    for (int i = 0; i < kWidth; ++i) total += lane[i];
    return total;
  }

  friend PortableVec operator+(PortableVec a, PortableVec b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] += b.lane[i];
    return a;
  }

  friend PortableVec operator-(PortableVec a, PortableVec b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
};

using F32 = PortableVec<float, 4>;
using F64 = PortableVec<double, 2>;
