// One split of decode attention, written once over F32 and F64 of a vec_*.h. Include after
// vec_math-inl.h, inside the same anonymous namespace.
//
// The keys of a split are scored, the scores become weights, the values are summed: three loops, so
// that a split needs no running maximum. Keys and values are read from memory once for all query
// heads of a group; what several passes of heads read again is in L1.

// Query heads that are taken through keys and values together.
inline constexpr int kHeadsPerPass = 4;

// Keys, or vectors of values, that such a pass takes at once: as many as leave its sums in
// registers.
template <class Vec>
inline constexpr int kGroupSize = Vec::kRegisters < 32 ? 3 : 4;

inline constexpr int kHeadsPerChunk = 16;     // whose scores are on the stack
inline constexpr int kSlotsPerBlock = 24;     // whole groups of three or four keys
inline constexpr int kPrefetchBytes = 12288;  // how far ahead: latency times bandwidth, and more

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// body(Constant<heads>, first head), in as few passes of kMost heads at most as there can be, all
// of about the same size.
template <int kMost, class Body>
void for_each_pass(int64_t heads, const Body& body) {
  static_assert(kMost <= 4);
  int64_t passes = (heads + kMost - 1) / kMost;
  for (int64_t g = 0; g < heads; --passes) {
    const int64_t count = (heads - g + passes - 1) / passes;
    switch (count) {
      case 1:
        body(Constant<1>{}, g);
        break;
      case 2:
        body(Constant<2>{}, g);
        break;
      case 3:
        body(Constant<3>{}, g);
        break;
      case 4:
        body(Constant<4>{}, g);
        break;
    }
    g += count;
  }
}

// body(Constant<group size>) for the keys and values that the passes of so many heads take at once.
template <class Vec, class Body>
void with_group_size(int64_t heads, const Body& body) {
  const int64_t passes = (heads + kHeadsPerPass - 1) / kHeadsPerPass;
  const int64_t widest = (heads + passes - 1) / passes;
  if constexpr (kGroupSize<Vec> < 4) {
    if (widest == kHeadsPerPass) return body(Constant<kGroupSize<Vec>>{});
  }
  body(Constant<4>{});
}

// Elements of T as vectors of the accumulator's type: how values are read, and keys where an
// instruction set has nothing better. What takes its place also says what queries are made of.
template <class T>
struct Widened {
  using Vec = typename VecOf<T>::type;
  using Query = Accumulator<T>;
  static constexpr int kElements = Vec::kLanes;  // of a vector

  template <class Element>
  static Vec load(const Element* from) {
    return Vec::load(from);
  }
  static Vec fma(Vec key, Vec query, Vec sum) { return Vec::fma(key, query, sum); }
};

// The first n < kElements elements, then zeros.
template <class Form, class T>
auto load_first(const T* from, int64_t n) {
  T elements[Form::kElements] = {};
  for (int64_t i = 0; i < n; ++i) elements[i] = from[i];
  return Form::load(elements);
}

// Bytes to be prefetched, in the order of memory: in another order they arrive slower.
class Ahead {
 public:
  static Ahead from(const void* first) { return Ahead(first, -1); }
  // The same again and again: what no page holds would be looked for in vain each time.
  static Ahead nothing(const void* near) { return Ahead(near, 0); }

  template <int64_t kBytes>
  void fetch() {
    static_assert(kBytes <= 256);
    prefetch(next_);
    if constexpr (kBytes > 64) prefetch(next_ + 64);
    if constexpr (kBytes > 128) prefetch(next_ + 128);
    if constexpr (kBytes > 192) prefetch(next_ + 192);
    next_ += kBytes & moves_;
  }

 private:
  Ahead(const void* first, int64_t moves) : next_(static_cast<const char*>(first)), moves_(moves) {}

  const char* next_;
  int64_t moves_;  // all bits, or none
};

// Splits are read block by block: their keys, their values, then the next split's keys. What is to
// be prefetched while the block at `slot` (values follow keys) is read, if rows have no gaps.
template <class T>
Ahead ahead_of(const AttentionSplit& split, int64_t slot) {
  const Ahead nothing = Ahead::nothing(split.keys);
  if (split.stride_keys != split.D || split.stride_values != split.D) return nothing;
  const int64_t block_bytes = kSlotsPerBlock * split.D * int64_t(sizeof(T));
  const int64_t blocks = (kPrefetchBytes + block_bytes - 1) / block_bytes;
  const int64_t target = slot + blocks * kSlotsPerBlock;
  const T* keys = static_cast<const T*>(split.keys);
  const T* values = static_cast<const T*>(split.values);
  if (target < split.slots) return Ahead::from(keys + target * split.D);
  if (target < 2 * split.slots) return Ahead::from(values + (target - split.slots) * split.D);
  const int64_t next = target - 2 * split.slots;
  if (next < split.next_slots) return Ahead::from(keys + (split.slots + next) * split.D);
  return nothing;
}

// Loops over the accumulators are unrolled early, or gcc keeps these arrays in memory.

// queries [kHeads, padded D], keys [kKeys, D] -> scores [kHeads, kKeys] in rows of kSlotsPerSplit.
template <class T, class Form, int kHeads, int kKeys>
Ahead score_keys(const AttentionSplit& split, const typename Form::Query* queries, const T* keys,
                 Ahead ahead, Accumulator<T>* scores) {
  using Vec = typename VecOf<T>::type;
  const int64_t D = split.D, D_padded = padded_head_dim(D);
  Vec sums[kHeads][kKeys];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int k = 0; k < kKeys; ++k) sums[h][k] = Vec::zero();
  }
  const auto add = [&](auto key, int k, int64_t d) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      sums[h][k] = Form::fma(key, Form::load(queries + h * D_padded + d), sums[h][k]);
    }
  };
  int64_t d = 0;
  for (; d + Form::kElements <= D; d += Form::kElements) {
    ahead.fetch<kKeys * Form::kElements * int64_t(sizeof(T))>();
#pragma GCC unroll 4
    for (int k = 0; k < kKeys; ++k) add(Form::load(keys + k * split.stride_keys + d), k, d);
  }
  if (d < D) {
#pragma GCC unroll 4
    for (int k = 0; k < kKeys; ++k) {
      add(load_first<Form>(keys + k * split.stride_keys + d, D - d), k, d);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    if constexpr (kKeys == 4) {
      Vec::store_sums(sums[h], scores + h * kSlotsPerSplit);
    } else if constexpr (kKeys == 3) {
      const Vec with_zero[4] = {sums[h][0], sums[h][1], sums[h][2], Vec::zero()};
      Accumulator<T> of_keys[4];
      Vec::store_sums(with_zero, of_keys);
      for (int k = 0; k < 3; ++k) scores[h * kSlotsPerSplit + k] = of_keys[k];
    } else {
#pragma GCC unroll 4
      for (int k = 0; k < kKeys; ++k) scores[h * kSlotsPerSplit + k] = sums[h][k].sum();
    }
  }
  return ahead;
}

// body(Constant<kAtOnce>, first), then body(Constant<1>, …) for what is left of n.
template <int kAtOnce, class Body>
void for_each_group(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) body(Constant<kAtOnce>{}, i);
  for (; i < n; ++i) body(Constant<1>{}, i);
}

// body(first slot, slots)
template <class Body>
void for_each_block(int64_t slots, const Body& body) {
  for (int64_t first = 0; first < slots; first += kSlotsPerBlock) {
    const int64_t left = slots - first;
    body(first, left < kSlotsPerBlock ? left : kSlotsPerBlock);
  }
}

template <class T, class Form>
void score_split(const AttentionSplit& split, const typename Form::Query* queries, int64_t heads,
                 Accumulator<T>* scores) {
  const int64_t D_padded = padded_head_dim(split.D);
  // Heads in the inner loop: what is prefetched by the first pass then comes evenly.
  const auto score_block = [&](auto group_size, int64_t first, int64_t n) {
    const T* keys = static_cast<const T*>(split.keys) + first * split.stride_keys;
    Ahead ahead = ahead_of<T>(split, first);
    for_each_group<group_size.value>(n, [&](auto group, int64_t i) {
      for_each_pass<kHeadsPerPass>(heads, [&](auto count, int64_t g) {
        const Ahead after = score_keys<T, Form, count.value, group.value>(
            split, queries + g * D_padded, keys + i * split.stride_keys,
            g == 0 ? ahead : Ahead::nothing(split.keys), scores + g * kSlotsPerSplit + first + i);
        if (g == 0) ahead = after;
      });
    });
  };
  with_group_size<typename VecOf<T>::type>(heads, [&](auto group_size) {
    for_each_block(split.slots,
                   [&](int64_t first, int64_t n) { score_block(group_size, first, n); });
  });
}

// scores [n] of one head -> exp(score - maximum), in place, after the scale and the soft cap. What
// follows them up to a whole vector is overwritten.
template <class Vec, class Scalar>
void weigh(Scalar* scores, int64_t n, Scalar scale, Scalar soft_cap, Scalar* maximum,
           Scalar* total) {
  constexpr Scalar kInfinity = Scalar(__builtin_inf());
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    (Vec::load(scores + i) * Vec::broadcast(scale)).store(scores + i);
  }
  if (soft_cap > 0) {
    const Vec cap = Vec::broadcast(soft_cap);
    for (int64_t i = 0; i < n; i += Vec::kLanes) {
      (cap * tanh(Vec::load(scores + i) / cap)).store(scores + i);
    }
  }
  for (int64_t i = n; i % Vec::kLanes != 0; ++i) scores[i] = -kInfinity;
  Vec greatest = Vec::broadcast(-kInfinity);
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    greatest = Vec::max(Vec::load(scores + i), greatest);
  }
  *maximum = greatest.greatest();

  // Finite, so that scores of minus infinity weigh nothing rather than NaN.
  const Vec base = Vec::max(Vec::broadcast(MathOf<Vec>::kLowest), Vec::broadcast(*maximum));
  Vec sum = Vec::zero();
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const Vec weights = exp_of_nonpositive(Vec::load(scores + i) - base);
    weights.store(scores + i);
    sum = sum + weights;
  }
  *total = sum.sum();
}

// sums [kHeads, …] += weights [kHeads, n] x values [n, …] in kVectors vectors of columns, or, if
// that is 0, in the last `width` columns. Weights are in rows of kSlotsPerSplit.
template <class T, int kHeads, int kVectors>
Ahead add_values(const AttentionSplit& split, const Accumulator<T>* weights, const T* values,
                 int64_t n, int64_t width, Ahead ahead, Accumulator<T>* sums) {
  using Vec = typename VecOf<T>::type;
  constexpr int kColumns = kVectors > 0 ? kVectors : 1;
  const int64_t stride = split.stride_sums;
  Vec sum[kHeads][kColumns];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      sum[h][c] = Vec::load(sums + h * stride + c * Vec::kLanes);
    }
  }
  for (int64_t t = 0; t < n; ++t, values += split.stride_values) {
    Vec weight[kHeads];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) weight[h] = Vec::broadcast(weights[h * kSlotsPerSplit + t]);
    ahead.fetch<kColumns * Vec::kLanes * int64_t(sizeof(T))>();
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const Vec value = kVectors > 0 ? Vec::load(values + c * Vec::kLanes)
                                     : load_first<Widened<T>>(values, width);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) sum[h][c] = Vec::fma(value, weight[h], sum[h][c]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      sum[h][c].store(sums + h * stride + c * Vec::kLanes);
    }
  }
  return ahead;
}

template <class T>
void sum_split(const AttentionSplit& split, const Accumulator<T>* weights, int64_t heads,
               Accumulator<T>* sums) {
  using Vec = typename VecOf<T>::type;
  constexpr int64_t kLanes = Vec::kLanes;
  const auto sum_block = [&](auto group_size, int64_t first, int64_t n) {
    const T* values = static_cast<const T*>(split.values) + first * split.stride_values;
    Ahead ahead = ahead_of<T>(split, split.slots + first);
    const auto add_columns = [&](auto vectors, int64_t d) {
      for_each_pass<kHeadsPerPass>(heads, [&](auto count, int64_t g) {
        const Ahead after = add_values<T, count.value, vectors.value>(
            split, weights + g * kSlotsPerSplit + first, values + d, n, split.D - d,
            g == 0 ? ahead : Ahead::nothing(split.keys), sums + g * split.stride_sums + d);
        if (g == 0) ahead = after;
      });
    };
    for_each_group<group_size.value>(
        split.D / kLanes, [&](auto vectors, int64_t i) { add_columns(vectors, i * kLanes); });
    if (split.D % kLanes != 0) add_columns(Constant<0>{}, split.D / kLanes * kLanes);
  };
  with_group_size<Vec>(heads, [&](auto group_size) {
    for_each_block(split.slots, [&](int64_t first, int64_t n) { sum_block(group_size, first, n); });
  });
}

// Query heads [g, g + heads), at most kHeadsPerChunk; their queries.
template <class T, class Form>
void attend_chunk(const AttentionSplit& split, int64_t g, int64_t heads,
                  const typename Form::Query* queries) {
  using Sum = Accumulator<T>;
  using Vec = typename VecOf<T>::type;
  const int64_t D_padded = padded_head_dim(split.D);
  Sum scores[kHeadsPerChunk * kSlotsPerSplit];
  score_split<T, Form>(split, queries, heads, scores);
  Sum* sums = static_cast<Sum*>(split.sums) + g * split.stride_sums;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t at = (g + h) * split.stride_totals;
    weigh<Vec>(scores + h * kSlotsPerSplit, split.slots, Sum(split.scale), Sum(split.soft_cap),
               static_cast<Sum*>(split.maxima) + at, static_cast<Sum*>(split.totals) + at);
    for (int64_t d = 0; d < D_padded; ++d) sums[h * split.stride_sums + d] = 0;
  }
  sum_split<T>(split, scores, heads, sums);
}

// body(first head, heads)
template <class Body>
void for_each_chunk(const AttentionSplit& split, const Body& body) {
  for (int64_t g = 0; g < split.G; g += kHeadsPerChunk) {
    body(g, split.G - g < kHeadsPerChunk ? split.G - g : kHeadsPerChunk);
  }
}

template <class T>
void attend(const AttentionSplit& split) {
  const auto* queries = static_cast<const Accumulator<T>*>(split.queries);
  for_each_chunk(split, [&](int64_t g, int64_t heads) {
    attend_chunk<T, Widened<T>>(split, g, heads, queries + g * padded_head_dim(split.D));
  });
}

inline float exp_scalar(float x) { return __builtin_expf(x); }
inline double exp_scalar(double x) { return __builtin_exp(x); }

template <class T>
void merge_splits(const SplitMerge& merge) {
  using Sum = Accumulator<T>;
  using Vec = typename VecOf<T>::type;
  const Sum* totals = static_cast<const Sum*>(merge.totals);
  const Sum* sums = static_cast<const Sum*>(merge.sums);
  Sum* weights = static_cast<Sum*>(merge.maxima);
  Sum maximum = weights[0];
  for (int64_t s = 1; s < merge.splits; ++s) maximum = weights[s] > maximum ? weights[s] : maximum;
  Sum total = 0;
  for (int64_t s = 0; s < merge.splits; ++s) {
    weights[s] = exp_scalar(weights[s] - maximum);
    total += weights[s] * totals[s];
  }

  const int64_t D_padded = padded_head_dim(merge.D);
  for (int64_t d = 0; d < merge.D; d += Vec::kLanes) {
    Vec sum = Vec::zero();
    for (int64_t s = 0; s < merge.splits; ++s) {
      sum = Vec::fma(Vec::load(sums + s * D_padded + d), Vec::broadcast(weights[s]), sum);
    }
    sum = sum / Vec::broadcast(total);
    T* output = static_cast<T*>(merge.output) + d;
    if (d + Vec::kLanes <= merge.D) {
      sum.store(output);
      continue;
    }
    Sum lanes[Vec::kLanes];
    sum.store(lanes);
    for (int64_t i = 0; d + i < merge.D; ++i) narrow(lanes[i], output + i);
  }
}
