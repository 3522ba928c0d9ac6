// Dot products of four bytes in each lane of 32 bits, in plain C++. Include after vec_portable.h,
// in the same anonymous namespace. This file says what every dot_*.h has.

struct I32 {
  int32_t lane[F32::kLanes];

  static I32 broadcast(int32_t x) {
    I32 v;
    for (int32_t& lane : v.lane) lane = x;
    return v;
  }
  F32 to_f32() const {
    F32 v;
    for (int i = 0; i < F32::kLanes; ++i) v.lane[i] = static_cast<float>(lane[i]);
    return v;
  }
};

// Four inputs of a token, in every lane.
struct Int8Inputs {
  int8_t byte[4];

  static Int8Inputs broadcast(const void* four_bytes) {
    Int8Inputs x;
    __builtin_memcpy(x.byte, four_bytes, 4);
    return x;
  }
};

// Four weights in [-127, 127] in each lane.
struct Int8Weights {
  static constexpr int32_t kOffset = 0;     // that a product adds to every weight
  static constexpr bool kUnrolled = false;  // the lines of a group
  int8_t byte[4 * F32::kLanes];

  static Int8Weights load(const void* from) {
    Int8Weights w;
    __builtin_memcpy(w.byte, from, sizeof w.byte);
    return w;
  }
  // sum + w . x
  I32 dot(Int8Inputs x, I32 sum) const {
    for (int i = 0; i < 4 * F32::kLanes; ++i) sum.lane[i / 4] += byte[i] * x.byte[i % 4];
    return sum;
  }
};

// Eight weights in [0, 15] in each lane: the low half of each byte, then the high half.
struct Int4Weights {
  Int8Weights low, high;

  static Int4Weights load(const void* from) {
    const Int8Weights packed = Int8Weights::load(from);
    Int4Weights w;
    for (int i = 0; i < 4 * F32::kLanes; ++i) {
      const auto byte = static_cast<uint8_t>(packed.byte[i]);
      w.low.byte[i] = byte & 15;
      w.high.byte[i] = byte >> 4;
    }
    return w;
  }
};

// The sum of a group of 32 products.
struct Int4Sum {
  I32 sum;

  static Int4Sum zero() { return {I32::broadcast(0)}; }
  void add(const Int4Weights& w, Int8Inputs low, Int8Inputs high) {
    sum = w.high.dot(high, w.low.dot(low, sum));
  }
  I32 total() const { return sum; }
};
