// What sampling asks of every logit, over F32 of a vec_*.h. Include after vec_math-inl.h.

// The greatest of x [n]; NaN if one of them is NaN or +inf.
float maximum(const float* x, int64_t n) {
  constexpr int kChains = 2;
  const F32 lowest = F32::broadcast(MathOf<F32>::kLowest);
  F32 greatest[kChains], zeros[kChains];  // 0 times what was seen, without -inf
  for (int c = 0; c < kChains; ++c) {
    greatest[c] = F32::broadcast(-__builtin_inff());
    zeros[c] = F32::zero();
  }
  int64_t i = 0;
  for (; i + kChains * F32::kLanes <= n; i += kChains * F32::kLanes) {
    for (int c = 0; c < kChains; ++c) {
      const F32 v = F32::load(x + i + c * F32::kLanes);
      greatest[c] = F32::max(v, greatest[c]);
      zeros[c] = F32::fma(F32::max(lowest, v), F32::zero(), zeros[c]);
    }
  }
  float lanes[F32::kLanes];
  F32::max(greatest[0], greatest[1]).store(lanes);
  float result = -__builtin_inff(), zero = (zeros[0] + zeros[1]).sum();
  for (const float lane : lanes) result = lane > result ? lane : result;
  for (; i < n; ++i) {
    result = x[i] > result ? x[i] : result;
    zero += (x[i] < MathOf<F32>::kLowest ? 0 : x[i]) * 0;
  }
  return result + zero;
}

// exp(x) for x <= 0, and 0 for -inf.
inline F32 exp_down_to_zero(F32 x) {
  const F32 least = exp_of_nonpositive(F32::broadcast(MathOf<F32>::kMinExponent));
  return F32::max(F32::zero(), exp_of_nonpositive(x) - least);
}

// to[i] = exp(x[i] - shift), no x[i] being above it.
void exponentials(const float* x, float shift, int64_t n, float* to) {
  const F32 shifts = F32::broadcast(shift);
  int64_t i = 0;
  for (; i + F32::kLanes <= n; i += F32::kLanes) {
    exp_down_to_zero(F32::load(x + i) - shifts).store(to + i);
  }
  if (i == n) return;
  float rest[F32::kLanes];
  for (int r = 0; r < F32::kLanes; ++r) rest[r] = i + r < n ? x[i + r] : shift;
  exp_down_to_zero(F32::load(rest) - shifts).store(rest);
  for (int r = 0; i + r < n; ++r) to[i + r] = rest[r];
}
