// Norm and activation between a decoder layer's products, over F32 of a vec_*.h. Include after
// vec_math-inl.h.

// to[i] = x[i] * scale * y[i].
void scaled_product(const float* x, const float* y, float scale, int64_t n, float* to) {
  const F32 scales = F32::broadcast(scale);
  int64_t i = 0;
  for (; i + F32::kLanes <= n; i += F32::kLanes) {
    (F32::load(x + i) * scales * F32::load(y + i)).store(to + i);
  }
  for (; i < n; ++i) to[i] = x[i] * scale * y[i];
}

// Turns (a[i], b[i]) by the angle whose cosine and sine are given.
void rotate_pairs(const float* cos, const float* sin, int64_t n, float* a, float* b) {
  int64_t i = 0;
  for (; i + F32::kLanes <= n; i += F32::kLanes) {
    const F32 x = F32::load(a + i), y = F32::load(b + i);
    const F32 c = F32::load(cos + i), s = F32::load(sin + i);
    (x * c - y * s).store(a + i);
    (y * c + x * s).store(b + i);
  }
  for (; i < n; ++i) {
    const float x = a[i], y = b[i];
    a[i] = x * cos[i] - y * sin[i];
    b[i] = y * cos[i] + x * sin[i];
  }
}

// x / (1 + exp(-x)) to a few units in the last place. Below -88 it stays about -1e-36.
inline F32 silu(F32 x) {
  constexpr float kMaxExponent = 88.0f;  // 2^k of exp of more is no number
  x = F32::max(F32::broadcast(-kMaxExponent), x);
  F32 power, rest;
  split_exponential(F32::max(F32::broadcast(MathOf<F32>::kMinExponent), F32::zero() - x), &power,
                    &rest);
  return x / (F32::broadcast(1) + F32::fma(power, rest, power));
}

// Blocks of kGateBlock gates and then as many ups -> silu(gate) * up.
void silu_and_multiply(const float* gate_up, int64_t blocks, float* to) {
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < kGateBlock; i += F32::kLanes) {
      (silu(F32::load(gate_up + i)) * F32::load(gate_up + kGateBlock + i)).store(to + i);
    }
    gate_up += 2 * kGateBlock;
    to += kGateBlock;
  }
}
