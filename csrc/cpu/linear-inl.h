// Products with packed weights, written once over F32 of a vec_*.h and the dot products of a
// dot_*.h. Include inside an anonymous namespace.
//
// A format says how one group of a panel is multiplied: its words (of 4 bytes) of every token are
// broadcast to all outputs, so sums stay in the lanes they belong to. A tile is some tokens times
// one or two panels whose sums stay in registers while K goes by; weights are loaded and unpacked
// once for all its tokens. The order of a sum along K is the same for every tile.

// Vectors of a panel's outputs.
inline constexpr int kVectors = kPanelRows / F32::kLanes;

// How many registers hold sums; the others are for weights and inputs.
inline constexpr int kSumRegisters = F32::kRegisters >= 32 ? 24 : 12;

// How far ahead of the weights memory is asked for them.
inline constexpr int64_t kPrefetchAhead = 8192;

// Where the streams of weights of a tile are.
template <int kPanels>
struct Streams {
  const char* lines[kPanels];
  const char* scales[kPanels];
  const char* ahead[kPanels];  // what to ask memory for while the group is multiplied
  int64_t panel_bytes, left;   // of the panels that are asked for

  Streams(const char* const* panels, int64_t panel_bytes, int64_t scale_bytes)
      : panel_bytes(panel_bytes), left(panel_bytes) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      scales[p] = ahead[p] = panels[p];
      lines[p] = scales[p] + scale_bytes;
    }
    const int64_t whole = kPrefetchAhead / panel_bytes;
    skip(whole * panel_bytes + whole * panel_bytes * (kPanels - 1));
    ask_further(kPrefetchAhead - whole * panel_bytes);
  }

  __attribute__((always_inline)) void ask_for(int line) const {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) prefetch(ahead[p] + line * kLineBytes);
  }
  // A panel that ends goes on behind those beside it.
  __attribute__((always_inline)) void ask_further(int64_t bytes) {
    skip(bytes);
    left -= bytes;
    if (left <= 0) {
      skip(panel_bytes * (kPanels - 1));
      left += panel_bytes;
    }
  }

 private:
  __attribute__((always_inline)) void skip(int64_t bytes) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) ahead[p] += bytes;
  }
};

// The words of a prepared token. Words of the tokens of a tile lie side by side.
struct TokenWords {
  char* first;
  int64_t stride;  // bytes

  template <class Word>
  void set(int64_t i, Word word) const {
    static_assert(sizeof word == 4);
    __builtin_memcpy(first + i * stride, &word, 4);
  }
  void set_all(const void* words, int64_t n) const {
    const char* from = static_cast<const char*>(words);
    if (stride == 4) {
      __builtin_memcpy(first, from, n * 4);
    } else {
      for (int64_t i = 0; i < n; ++i) __builtin_memcpy(first + i * stride, from + i * 4, 4);
    }
  }
  TokenWords from(int64_t i) const { return {first + i * stride, stride}; }
};

// --- Formats ----------------------------------------------------------------------------------

// Lines of floats. Line says how one is multiplied: word by word of the token.
template <class Line>
struct FloatFormat {
  static constexpr Precision kPrecision = Line::kPrecision;
  static constexpr int kLines = 1, kPrefetchLines = 1;  // of a group
  static constexpr int kGroupScales = 0;                // of an output
  static constexpr int kWords = Line::kWords;           // of a group of a token
  static constexpr int kSums = Line::kSums;             // of a tile, in vectors

  template <int kPanels, int kTokens>
  __attribute__((always_inline)) static void add_group(const Streams<kPanels>& weights,
                                                       const char* words,
                                                       F32 (&sums)[kPanels][kTokens][kVectors]) {
    weights.ask_for(0);
#pragma GCC unroll 2
    for (int i = 0; i < kWords; ++i) {
      typename Line::Weights w[kPanels][kVectors];
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          w[p][v] = Line::load(weights.lines[p] + v * sizeof(F32), i);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const auto x = Line::broadcast(words + (i * kTokens + t) * 4);
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[p][t][v] = Line::fma(w[p][v], x, sums[p][t][v]);
        }
      }
    }
  }

  static void prepare_token(const float* x, int64_t K, const TokenWords& to) {
    Line::prepare_token(x, K, to);
  }
};

struct Float32Line {
  static constexpr Precision kPrecision = Precision::kFloat32;
  static constexpr int kWords = 1;
  static constexpr int kSums = kSumRegisters;
  using Weights = F32;

  static F32 load(const char* line, int) { return F32::load(reinterpret_cast<const float*>(line)); }
  static F32 broadcast(const char* word) {
    float x;
    __builtin_memcpy(&x, word, 4);
    return F32::broadcast(x);
  }
  static F32 fma(F32 w, F32 x, F32 sum) { return F32::fma(w, x, sum); }
  static void prepare_token(const float* x, int64_t K, const TokenWords& to) { to.set_all(x, K); }
};

// bf16 weights times f32 inputs.
struct BFloat16Line {
  static constexpr Precision kPrecision = Precision::kBFloat16;
  static constexpr int kWords = 2;
  static constexpr int kSums = F32::kRegisters >= 32 ? 24 : 10;  // unpacking takes registers too
  using Weights = F32;

  static F32 load(const char* line, int word) {
    const auto* pairs = reinterpret_cast<const BFloat16*>(line);
    return word == 0 ? F32::load_first(pairs) : F32::load_second(pairs);
  }
  static F32 broadcast(const char* word) { return Float32Line::broadcast(word); }
  static F32 fma(F32 w, F32 x, F32 sum) { return F32::fma(w, x, sum); }
  static void prepare_token(const float* x, int64_t K, const TokenWords& to) {
    to.set_all(x, K);
    if (K % 2 != 0) to.set(K, 0.0f);
  }
};

using Float32Lines = FloatFormat<Float32Line>;
using BFloat16Lines = FloatFormat<BFloat16Line>;

// What a group of a token's inputs becomes: x = scale q.
struct QuantisedInputs {
  float scale;
  float sum;  // of all q, an integer
};

// x [n] with zeros to kGroup -> q [kGroup], each in [-127, 127]. Where x is not finite, scale is
// NaN.
template <int kGroup>
QuantisedInputs quantise_group(const float* x, int64_t n, int8_t* q) {
  constexpr int kCount = kGroup / F32::kLanes;
  float padded[kGroup];
  if (n < kGroup) {
    for (int i = 0; i < kGroup; ++i) padded[i] = i < n ? x[i] : 0;
    x = padded;
  }
  F32 magnitude = F32::zero();
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    const F32 lanes = F32::load(x + i * F32::kLanes);
    magnitude = F32::max(F32::max(lanes, F32::zero() - lanes), magnitude);
  }
  const float greatest = magnitude.greatest();
  // Below, the inverse would be infinite.
  const float inverse = greatest > 0x1p-100f ? 127 / greatest : 0;
  const F32 shift = F32::broadcast(F32::kRoundingShift);
  F32 sum = F32::zero();
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    const F32 shifted = F32::fma(F32::load(x + i * F32::kLanes), F32::broadcast(inverse), shift);
    const F32 rounded = shifted - shift;
    rounded.store(q + i * F32::kLanes);
    sum = sum + rounded;
  }
  const float total = sum.sum();
  if (total != total) return {total, 0};
  return {greatest / 127, total};
}

// Groups of integers: sums of a group are exact, scales are applied to them. Code says what a line
// of weights is, what it does to a sum, and how a sum ends.
template <class Code>
struct IntegerGroups {
  static constexpr Precision kPrecision = Code::kPrecision;
  static constexpr int kGroup = group_size(kPrecision);
  static constexpr int kLines = kGroup / 4 / Code::kInputs, kPrefetchLines = kLines + 1;
  static constexpr int kGroupScales = Code::kGroupScales;
  static constexpr int kWords = kGroup / 4 + 2;  // inputs, and two facts about them
  static constexpr int kSums = F32::kRegisters >= 32 ? (kVectors == 1 ? 12 : 16) : 8;

  template <int kPanels, int kTokens>
  __attribute__((always_inline)) static void add_group(const Streams<kPanels>& weights,
                                                       const char* words,
                                                       F32 (&sums)[kPanels][kTokens][kVectors]) {
    const char* facts = words + kGroup / 4 * kTokens * 4;  // [2, kTokens]
    typename Code::Sum totals[kPanels][kTokens][kVectors];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const auto first = Code::first_sum(facts + t * 4);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) totals[p][t][v] = first;
      }
    }
    weights.ask_for(kLines);
    if constexpr (Code::kUnrolled) {
#pragma GCC unroll 16
      for (int i = 0; i < kLines; ++i) add_line(i, weights, words, totals);
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < kLines; ++i) add_line(i, weights, words, totals);
    }
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const typename Code::Scales scales(reinterpret_cast<const Float16*>(weights.scales[p]) +
                                           v * F32::kLanes);
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          sums[p][t][v] =
              scales.add(totals[p][t][v], facts + t * 4, facts + (kTokens + t) * 4, sums[p][t][v]);
        }
      }
    }
  }

  static void prepare_token(const float* x, int64_t K, const TokenWords& to) {
    for (int64_t g = 0; g * kGroup < K; ++g) {
      int8_t q[kGroup];
      const QuantisedInputs group =
          quantise_group<kGroup>(x + g * kGroup, smaller(kGroup, K - g * kGroup), q);
      const TokenWords words = to.from(g * kWords);
      words.set_all(q, kGroup / 4);
      Code::set_facts(group, words.from(kGroup / 4));
    }
  }

 private:
  template <int kPanels, int kTokens>
  __attribute__((always_inline)) static void add_line(
      int i, const Streams<kPanels>& weights, const char* words,
      typename Code::Sum (&totals)[kPanels][kTokens][kVectors]) {
    weights.ask_for(i);
    typename Code::Weights w[kPanels][kVectors];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        w[p][v] = Code::Weights::load(weights.lines[p] + i * kLineBytes + v * sizeof(F32));
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      Int8Inputs x[Code::kInputs];
#pragma GCC unroll 2
      for (int j = 0; j < Code::kInputs; ++j) {
        x[j] = Int8Inputs::broadcast(words + ((Code::kInputs * i + j) * kTokens + t) * 4);
      }
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) Code::add(w[p][v], x, totals[p][t][v]);
      }
    }
  }
};

// Facts: where a sum begins (int32), the scale of the inputs (f32).
struct Int8Code {
  static constexpr Precision kPrecision = Precision::kInt8;
  static constexpr int kInputs = 1, kGroupScales = 1;
  static constexpr bool kUnrolled = Int8Weights::kUnrolled;
  using Weights = Int8Weights;
  using Sum = I32;

  static I32 first_sum(const char* fact) {
    int32_t first;
    __builtin_memcpy(&first, fact, 4);
    return I32::broadcast(first);
  }
  static void add(const Int8Weights& w, const Int8Inputs (&x)[1], I32& sum) {
    sum = w.dot(x[0], sum);
  }
  static void set_facts(QuantisedInputs group, const TokenWords& to) {
    to.set(0, -Int8Weights::kOffset * static_cast<int32_t>(group.sum));
    to.set(1, group.scale);
  }

  struct Scales {
    F32 scale;

    explicit Scales(const Float16* from) : scale(F32::load(from)) {}
    F32 add(I32 total, const char*, const char* input_scale, F32 sum) const {
      return F32::fma(scale * Float32Line::broadcast(input_scale), total.to_f32(), sum);
    }
  };
};

// Facts: the scale of the inputs, and that times their sum.
struct Int4Code {
  static constexpr Precision kPrecision = Precision::kInt4;
  static constexpr int kInputs = 2, kGroupScales = 2;
  // With few registers the sums of unrolled lines go to memory and back.
  static constexpr bool kUnrolled = F32::kRegisters >= 32;
  using Weights = Int4Weights;
  using Sum = Int4Sum;

  static Int4Sum first_sum(const char*) { return Int4Sum::zero(); }
  static void add(const Int4Weights& w, const Int8Inputs (&x)[2], Int4Sum& sum) {
    sum.add(w, x[0], x[1]);
  }
  static void set_facts(QuantisedInputs group, const TokenWords& to) {
    to.set(0, group.scale);
    to.set(1, group.scale * group.sum);
  }

  struct Scales {
    F32 step, minimum;

    explicit Scales(const Float16* from)
        : step(F32::load(from)), minimum(F32::load(from + kPanelRows)) {}
    F32 add(Int4Sum total, const char* input_scale, const char* input_sum, F32 sum) const {
      sum = F32::fma(minimum, Float32Line::broadcast(input_sum), sum);
      return F32::fma(step * Float32Line::broadcast(input_scale), total.total().to_f32(), sum);
    }
  };
};

using Int8Groups = IntegerGroups<Int8Code>;
using Int4Groups = IntegerGroups<Int4Code>;

// --- Tiles ------------------------------------------------------------------------------------

// Panels of a tile of some tokens.
template <class Format, int kTokens>
inline constexpr int kTilePanels = 2 * kVectors * kTokens <= Format::kSums ? 2 : 1;

// Tokens of the largest tile: two panels where a panel is one vector, else one.
template <class Format>
inline constexpr int kTileTokens = Format::kSums / kVectors / (kVectors == 1 ? 2 : 1);

// Groups of K inputs, as a format multiplies them.
template <class Format>
int64_t count_groups(int64_t K) {
  return lines_per_panel(Format::kPrecision, K) / Format::kLines;
}

// M tokens in as few tiles as there can be, of about the same size.
template <class Format>
struct Tiling {
  int64_t M, tokens, token_bytes;  // tokens of every tile but the last

  Tiling(int64_t M, int64_t K)
      : M(M),
        tokens(M == 0 ? 1 : ceil_div(M, ceil_div(M, int64_t{kTileTokens<Format>}))),
        token_bytes(count_groups<Format>(K) * Format::kWords * 4) {}

  int64_t size(int64_t first) const { return smaller(tokens, M - first); }  // of a tile
  TokenWords words(std::byte* input, int64_t m) const {
    const int64_t first = m / tokens * tokens;
    char* tile = reinterpret_cast<char*>(input) + first * token_bytes;
    return {tile + (m - first) * 4, size(first) * 4};
  }
};

// Two consecutive panels, or the last one twice.
struct PanelPair {
  const char* panels[2];
  int64_t outputs[2];  // that are wanted of each
  int64_t panel_bytes, scale_bytes, groups;
};

inline void store_outputs(const F32 (&sums)[kVectors], int64_t count, float* y) {
  if (count == kPanelRows) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v].store(y + v * F32::kLanes);
    return;
  }
  float outputs[kPanelRows];
  for (int v = 0; v < kVectors; ++v) sums[v].store(outputs + v * F32::kLanes);
  for (int64_t i = 0; i < count; ++i) y[i] = outputs[i];
}

// A tile of kTokens times panels [first, first + kPanels) of the pair.
template <class Format, int kPanels, int kTokens>
__attribute__((noinline)) void multiply_tile(const PanelPair& pair, int first, const char* words,
                                             float* y, int64_t stride_y) {
  Streams<kPanels> weights(pair.panels + first, pair.panel_bytes, pair.scale_bytes);
  F32 sums[kPanels][kTokens][kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kPanels * kTokens * kVectors; ++i) (&sums[0][0][0])[i] = F32::zero();
  for (int64_t g = 0; g < pair.groups; ++g) {
    Format::template add_group<kPanels, kTokens>(weights, words, sums);
    weights.ask_further(Format::kPrefetchLines * kLineBytes);
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      weights.lines[p] += Format::kLines * kLineBytes;
      weights.scales[p] += Format::kGroupScales * kPanelRows * 2;
    }
    words += Format::kWords * kTokens * 4;
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int p = 0; p < kPanels; ++p) {
      store_outputs(sums[p][t], pair.outputs[first + p], y + t * stride_y + p * kPanelRows);
    }
  }
}

// A tile of `tokens` <= kTokens times both panels.
template <class Format, int kTokens>
void multiply_pair(const PanelPair& pair, int64_t tokens, const char* words, float* y,
                   int64_t stride_y) {
  if constexpr (kTokens > 0) {
    if (tokens < kTokens) {
      return multiply_pair<Format, kTokens - 1>(pair, tokens, words, y, stride_y);
    }
    constexpr int kPanels = kTilePanels<Format, kTokens>;
    for (int p = 0; p < 2 && pair.outputs[p] > 0; p += kPanels) {
      multiply_tile<Format, kPanels, kTokens>(pair, p, words, y + p * kPanelRows, stride_y);
    }
  }
}

template <class Format>
void multiply_panels(const LinearProduct& product) {
  constexpr int64_t kBlockBytes = 256 * 1024;  // of inputs that all panels find in L2
  const PackedMatrix& weights = product.weights;
  const Tiling<Format> tiling(product.M, weights.K);
  const int64_t tile_bytes = tiling.tokens * tiling.token_bytes;
  const int64_t block = larger(1, kBlockBytes / larger(1, tile_bytes)) * tiling.tokens;
  PanelPair pair;
  pair.panel_bytes = weights.panel_bytes();
  pair.scale_bytes = scale_bytes(Format::kPrecision, weights.K);
  pair.groups = count_groups<Format>(weights.K);
  for (int64_t begin = 0; begin < product.M; begin += block) {
    const int64_t end = smaller(begin + block, product.M);
    for (int64_t panel = product.first; panel < product.last; panel += 2) {
      for (int64_t p = 0; p < 2; ++p) {
        const bool exists = panel + p < product.last;
        pair.panels[p] = reinterpret_cast<const char*>(weights.data) +
                         (exists ? panel + p : panel) * pair.panel_bytes;
        pair.outputs[p] = exists ? smaller(kPanelRows, weights.N - (panel + p) * kPanelRows) : 0;
      }
      for (int64_t m = begin; m < end; m += tiling.tokens) {
        const char* words = reinterpret_cast<const char*>(product.input) + m * tiling.token_bytes;
        multiply_pair<Format, kTileTokens<Format>>(
            pair, tiling.size(m), words, product.y + m * product.stride_y + panel * kPanelRows,
            product.stride_y);
      }
    }
  }
}

template <class Format>
void prepare_tokens(const LinearInput& input) {
  const Tiling<Format> tiling(input.M, input.K);
  for (int64_t m = input.first; m < input.last; ++m) {
    Format::prepare_token(input.x + m * input.stride_M, input.K, tiling.words(input.to, m));
  }
}

template <class Format>
int64_t token_bytes(int64_t K) {
  return Tiling<Format>(1, K).token_bytes;
}

template <class Format>
constexpr LinearKernels make_linear() {
  return {token_bytes<Format>, prepare_tokens<Format>, multiply_panels<Format>};
}
