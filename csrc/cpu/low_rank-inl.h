// Products with packed columns, see ../low_rank.h; after linear-inl.h, whose lines they have.
// Include inside an anonymous namespace.

inline void load_outputs(const float* y, int64_t count, F32 (&sums)[kVectors]) {
  float outputs[kPanelRows];
  if (count < kPanelRows) {
    for (int64_t i = 0; i < kPanelRows; ++i) outputs[i] = i < count ? y[i] : 0;
    y = outputs;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sums[v] = F32::load(y + v * F32::kLanes);
}

// kTokens tokens times the columns of one panel.
template <int kTokens>
void add_panel_columns(const char* lines, int64_t pairs, const float* z, int64_t stride_z,
                       int64_t outputs, float* y, int64_t stride_y) {
  F32 sums[kTokens][kVectors];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) load_outputs(y + t * stride_y, outputs, sums[t]);
  for (int64_t i = 0; i < pairs; ++i, lines += kLineBytes, z += 2) {
    prefetch(lines + kPrefetchAhead);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const F32 w = BFloat16Line::load(lines + v * sizeof(F32), j);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          sums[t][v] = F32::fma(w, F32::broadcast(z[t * stride_z + j]), sums[t][v]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) store_outputs(sums[t], outputs, y + t * stride_y);
}

inline void add_columns(const ColumnsProduct& product) {
  constexpr int kTokens = F32::kRegisters >= 32 ? 4 : 2;
  const auto [B, z, stride_z, M, first, last, y, stride_y] = product;
  for (int64_t p = first; p < last; ++p) {
    const PanelColumns columns = B.panel(p);
    const char* lines = reinterpret_cast<const char*>(B.data) + columns.line * kLineBytes;
    const int64_t outputs = smaller(kPanelRows, B.N - p * kPanelRows);
    const float* from = z + 2 * columns.first;
    float* to = y + p * kPanelRows;
    int64_t m = 0;
    for (; m + kTokens <= M; m += kTokens) {
      add_panel_columns<kTokens>(lines, columns.pairs, from + m * stride_z, stride_z, outputs,
                                 to + m * stride_y, stride_y);
    }
    for (; m < M; ++m) {
      add_panel_columns<1>(lines, columns.pairs, from + m * stride_z, stride_z, outputs,
                           to + m * stride_y, stride_y);
    }
  }
}
