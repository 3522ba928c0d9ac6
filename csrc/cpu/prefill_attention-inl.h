// A block of tokens of prefill attention, written once over F32 of a vec_*.h. Include after
// attention-inl.h, inside the same anonymous namespace.
//
// The rows of a block are its tokens' query heads, (token, head) in order. Vectors run over rows
// while keys are scored and the scores become weights, so nothing is ever summed across lanes, and
// over head_dim while values are summed. Rows are taken in tiles whose scores stay in L1, slots in
// blocks; a running maximum and total of every row join the blocks (online softmax).

template <class Vec>
inline constexpr int kVectorsPerTile = Vec::kRegisters >= 32 ? 4 : 3;
template <class Vec>
inline constexpr int kRowsPerTile = kVectorsPerTile<Vec> * Vec::kLanes;
template <class Vec>
inline constexpr int kSlotsPerStep = Vec::kRegisters >= 32 ? 6 : 4;  // scored together
inline constexpr int kRowsPerStep = 4;                               // whose sums are in registers

static_assert(kRowsPerTile<F32> <= kMaxPrefillTile && kRowsPerTile<F32> % kRowsPerStep == 0 &&
              kPrefillSlots % kSlotsPerStep<F32> == 0);

// The parts of PrefillBlock::scratch; tiles of kRowsPerTile rows follow one another.
struct PrefillScratch {
  float *keys, *values;  // [kPrefillSlots, padded D]: a block of slots widened
  float* scores;         // [kPrefillSlots, rows of a tile]
  float* maxima;         // [rows]
  float* totals;         // [rows]
  float* queries;        // [tiles, D, rows of a tile], times the scale
  float* sums;           // [rows, padded D]

  explicit PrefillScratch(const PrefillBlock& block) {
    const int64_t D = padded_head_dim(block.D);
    const int64_t rows = block.tokens * block.G + kMaxPrefillTile;
    keys = block.scratch;
    values = keys + kPrefillSlots * D;
    scores = values + kPrefillSlots * D;
    maxima = scores + kPrefillSlots * kMaxPrefillTile;
    totals = maxima + rows;
    queries = totals + rows;
    sums = queries + rows * D;
  }
};

inline int64_t clamp_to(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Consecutive slots from `first` on, as f32.
struct PrefillSlots {
  int64_t first, count;
  const float *keys, *values;
  int64_t stride_keys, stride_values;
};

// Rows [first, first + rows) of a block.
struct PrefillTile {
  int64_t first, rows;
  float *queries, *sums, *maxima, *totals;
};

// The slots that row i sees, counted from slots.first on: [first, last), maybe none of this block.
struct SeenSlots {
  int64_t first, last;
};
inline SeenSlots seen_slots(const PrefillBlock& block, const PrefillSlots& slots, int64_t i,
                            int64_t last_row) {
  const int64_t first = block.first + i / block.G - block.window + 1;
  const int64_t last = block.first + last_row / block.G + 1;
  return {clamp_to(first - slots.first, 0, slots.count),
          clamp_to(last - slots.first, 0, slots.count)};
}

// from [count, D] -> to [count, padded D] with zeros beyond D.
template <class T>
void widen_rows(const T* from, int64_t count, int64_t D, float* to) {
  const int64_t D_padded = padded_head_dim(D);
  for (int64_t s = 0; s < count; ++s, from += D, to += D_padded) {
    int64_t d = 0;
    for (; d + F32::kLanes <= D; d += F32::kLanes) F32::load(from + d).store(to + d);
    if (d < D) load_first<Widened<T>>(from + d, D - d).store(to + d);
  }
}

// Slots [first, first + count): f32 where they are if vectors end with a row, else widened.
template <class T>
PrefillSlots load_slots(const PrefillBlock& block, const PrefillScratch& scratch, int64_t first,
                        int64_t count) {
  const int64_t D = block.D;
  const T* keys = static_cast<const T*>(block.keys) + first * D;
  const T* values = static_cast<const T*>(block.values) + first * D;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (D % F32::kLanes == 0) return {first, count, keys, values, D, D};
    widen_rows(values, count, D, scratch.values);
    return {first, count, keys, scratch.values, D, padded_head_dim(D)};
  } else {
    const int64_t D_padded = padded_head_dim(D);
    widen_rows(keys, count, D, scratch.keys);
    widen_rows(values, count, D, scratch.values);
    return {first, count, scratch.keys, scratch.values, D_padded, D_padded};
  }
}

// query [tokens, G, D] -> [tiles, D, rows of a tile], times the scale; zeros in rows beyond.
inline void pack_queries(const PrefillBlock& block, float* to) {
  constexpr int64_t kRows = kRowsPerTile<F32>;
  const int64_t rows = block.tokens * block.G, D = block.D;
  int64_t i = 0;
  for (; i < rows; ++i) {
    const float* from = block.query + i / block.G * block.stride_T + i % block.G * D;
    float* lane = to + i / kRows * kRows * D + i % kRows;
    for (int64_t d = 0; d < D; ++d) lane[d * kRows] = block.scale * from[d];
  }
  for (; i % kRows != 0; ++i) {
    float* lane = to + i / kRows * kRows * D + i % kRows;
    for (int64_t d = 0; d < D; ++d) lane[d * kRows] = 0;
  }
}

// queries [D, kVectors] x keys [kSlots, D] -> scores [kSlots, kVectors].
template <int kVectors, int kSlots>
void score_slots(const float* queries, const float* const (&keys)[kSlots], int64_t D,
                 float* scores) {
  F32 sums[kSlots][kVectors];
  for (int s = 0; s < kSlots; ++s) {
    for (int v = 0; v < kVectors; ++v) sums[s][v] = F32::zero();
  }
  for (int64_t d = 0; d < D; ++d, queries += kRowsPerTile<F32>) {
    F32 query[kVectors];
    for (int v = 0; v < kVectors; ++v) query[v] = F32::load(queries + v * F32::kLanes);
    for (int s = 0; s < kSlots; ++s) {
      const F32 key = F32::broadcast(keys[s][d]);
      for (int v = 0; v < kVectors; ++v) sums[s][v] = F32::fma(query[v], key, sums[s][v]);
    }
  }
  for (int s = 0; s < kSlots; ++s) {
    for (int v = 0; v < kVectors; ++v) {
      sums[s][v].store(scores + s * kRowsPerTile<F32> + v * F32::kLanes);
    }
  }
}

inline void fill(float* to, int64_t first, int64_t last, float value) {
  int64_t i = first;
  for (; i + F32::kLanes <= last; i += F32::kLanes) F32::broadcast(value).store(to + i);
  for (; i < last; ++i) to[i] = value;
}

// Gives `value` to what rows do not see of the slots in `seen`. The rows that see a slot follow one
// another: the tokens from its own on, up to those whose window has left it.
inline void fill_unseen(const PrefillBlock& block, const PrefillSlots& slots,
                        const PrefillTile& tile, SeenSlots seen, int64_t rows, float value,
                        float* scores) {
  for (int64_t s = seen.first; s < seen.last; ++s) {
    const int64_t token = slots.first + s - block.first;  // the slot's own
    float* of_slot = scores + s * kRowsPerTile<F32>;
    fill(of_slot, 0, clamp_to(token * block.G - tile.first, 0, rows), value);
    fill(of_slot, clamp_to((token + block.window) * block.G - tile.first, 0, rows), rows, value);
  }
}

// scores -> exp(score - maximum), in place, over the maximum of all slots so far; `scales`: what
// the sums of the slots before shrink by.
template <int kVectors>
void weigh_rows(const PrefillTile& tile, SeenSlots seen, float* scores, float* scales) {
  constexpr int64_t kLanes = F32::kLanes;
  F32 maxima[kVectors], totals[kVectors];
  for (int v = 0; v < kVectors; ++v) maxima[v] = F32::load(tile.maxima + v * kLanes);
  for (int64_t s = seen.first; s < seen.last; ++s) {
    const float* of_slot = scores + s * kRowsPerTile<F32>;
    for (int v = 0; v < kVectors; ++v) {
      maxima[v] = F32::max(F32::load(of_slot + v * kLanes), maxima[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const F32 scale = exp_of_nonpositive(F32::load(tile.maxima + v * kLanes) - maxima[v]);
    scale.store(scales + v * kLanes);
    totals[v] = scale * F32::load(tile.totals + v * kLanes);
    maxima[v].store(tile.maxima + v * kLanes);
  }
  for (int64_t s = seen.first; s < seen.last; ++s) {
    float* of_slot = scores + s * kRowsPerTile<F32>;
    for (int v = 0; v < kVectors; ++v) {
      const F32 weight = exp_of_nonpositive(F32::load(of_slot + v * kLanes) - maxima[v]);
      weight.store(of_slot + v * kLanes);
      totals[v] = totals[v] + weight;
    }
  }
  for (int v = 0; v < kVectors; ++v) totals[v].store(tile.totals + v * kLanes);
}

// sums [kRowsPerStep, kColumns] = scale * sums + weights x values over the slots in `seen`.
template <int kColumns>
void add_weighted(const float* weights, const float* values, int64_t stride_values, SeenSlots seen,
                  const float* scales, int64_t stride_sums, float* sums) {
  constexpr int64_t kLanes = F32::kLanes;
  F32 sum[kRowsPerStep][kColumns];
  for (int r = 0; r < kRowsPerStep; ++r) {
    const F32 scale = F32::broadcast(scales[r]);
    for (int c = 0; c < kColumns; ++c) {
      sum[r][c] = scale * F32::load(sums + r * stride_sums + c * kLanes);
    }
  }
  values += seen.first * stride_values;
  weights += seen.first * kRowsPerTile<F32>;
  for (int64_t s = seen.first; s < seen.last; ++s) {
    F32 value[kColumns];
    for (int c = 0; c < kColumns; ++c) value[c] = F32::load(values + c * kLanes);
    for (int r = 0; r < kRowsPerStep; ++r) {
      const F32 weight = F32::broadcast(weights[r]);
      for (int c = 0; c < kColumns; ++c) sum[r][c] = F32::fma(value[c], weight, sum[r][c]);
    }
    values += stride_values;
    weights += kRowsPerTile<F32>;
  }
  for (int r = 0; r < kRowsPerStep; ++r) {
    for (int c = 0; c < kColumns; ++c) sum[r][c].store(sums + r * stride_sums + c * kLanes);
  }
}

template <int kVectors>
void attend_tile(const PrefillBlock& block, const PrefillSlots& slots, const PrefillTile& tile,
                 float* scores) {
  constexpr int kSteps = kSlotsPerStep<F32>;
  constexpr float kInfinity = __builtin_inff();
  const int64_t last_row = tile.first + tile.rows - 1;
  const SeenSlots seen = seen_slots(block, slots, tile.first, last_row);
  if (seen.first >= seen.last) return;

  for (int64_t s = seen.first / kSteps * kSteps; s < seen.last; s += kSteps) {
    const float* keys[kSteps];
    for (int k = 0; k < kSteps; ++k) {  // the last one again where there are no more
      keys[k] = slots.keys + clamp_to(s + k, 0, seen.last - 1) * slots.stride_keys;
    }
    score_slots<kVectors>(tile.queries, keys, block.D, scores + s * kRowsPerTile<F32>);
  }

  // Do the last rows see the first of these slots, and the first rows the last one?
  const SeenSlots by_all = seen_slots(block, slots, last_row, tile.first);
  const bool is_cut = by_all.first > seen.first || by_all.last < seen.last;
  constexpr int64_t kRows = kVectors * F32::kLanes;
  float scales[kRows];
  if (is_cut) fill_unseen(block, slots, tile, seen, kRows, -kInfinity, scores);
  weigh_rows<kVectors>(tile, seen, scores, scales);
  if (is_cut) fill_unseen(block, slots, tile, seen, kRows, 0, scores);

  const int64_t columns = (block.D + F32::kLanes - 1) / F32::kLanes;
  const int64_t D_padded = padded_head_dim(block.D);
  for (int64_t r = 0; r < tile.rows; r += kRowsPerStep) {
    const int64_t last =
        r + kRowsPerStep < tile.rows ? tile.first + r + kRowsPerStep - 1 : last_row;
    const SeenSlots by_rows = seen_slots(block, slots, tile.first + r, last);
    if (by_rows.first >= by_rows.last) continue;
    for_each_pass<kVectorsPerTile<F32>>(columns, [&](auto count, int64_t c) {
      const int64_t d = c * F32::kLanes;
      add_weighted<count.value>(scores + r, slots.values + d, slots.stride_values, by_rows,
                                scales + r, D_padded, tile.sums + r * D_padded + d);
    });
  }
}

// output [tokens, G, D] = sums / totals.
inline void write_output(const PrefillBlock& block, const PrefillScratch& scratch) {
  const int64_t rows = block.tokens * block.G, D = block.D, D_padded = padded_head_dim(D);
  for (int64_t i = 0; i < rows; ++i) {
    const float* sums = scratch.sums + i * D_padded;
    float* to = block.output + i / block.G * block.stride_T + i % block.G * D;
    const F32 total = F32::broadcast(scratch.totals[i]);
    int64_t d = 0;
    for (; d + F32::kLanes <= D; d += F32::kLanes) (F32::load(sums + d) / total).store(to + d);
    if (d == D) continue;
    float lanes[F32::kLanes];
    (F32::load(sums + d) / total).store(lanes);
    for (int64_t j = 0; d + j < D; ++j) to[d + j] = lanes[j];
  }
}

template <class T>
void attend_tokens(const PrefillBlock& block) {
  constexpr int64_t kRows = kRowsPerTile<F32>;
  const PrefillScratch scratch(block);
  const int64_t rows = block.tokens * block.G, D_padded = padded_head_dim(block.D);
  const int64_t padded_rows = (rows + kRows - 1) / kRows * kRows;
  pack_queries(block, scratch.queries);
  // Finite, so that scores of minus infinity weigh nothing rather than NaN.
  fill(scratch.maxima, 0, padded_rows, MathOf<F32>::kLowest);
  fill(scratch.totals, 0, padded_rows, 0);
  fill(scratch.sums, 0, padded_rows * D_padded, 0);

  const int64_t seen = clamp_to(block.first - block.window + 1, 0, block.first);
  const int64_t end = block.first + block.tokens;
  for (int64_t s = seen / kPrefillSlots * kPrefillSlots; s < end; s += kPrefillSlots) {
    const int64_t count = clamp_to(end - s, 1, kPrefillSlots);
    const PrefillSlots slots = load_slots<T>(block, scratch, s, count);
    for (int64_t i = 0; i < rows; i += kRows) {
      const PrefillTile tile = {i,
                                clamp_to(rows - i, 1, kRows),
                                scratch.queries + i * block.D,
                                scratch.sums + i * D_padded,
                                scratch.maxima + i,
                                scratch.totals + i};
      const int64_t vectors = (tile.rows + F32::kLanes - 1) / F32::kLanes;
      for_each_pass<kVectorsPerTile<F32>>(vectors, [&](auto count, int64_t) {
        attend_tile<count.value>(block, slots, tile, scratch.scores);
      });
    }
  }
  write_output(block, scratch);
}
