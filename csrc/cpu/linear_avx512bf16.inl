// The multiply of one LinearTask with BF16 weights and activations in bf16, a pair of columns at a time.
// Included by isa_avx512bf16.cpp alone, after linear.inl.
#pragma once

#include "cpu/linear_bf16.inl"

namespace engine {
namespace {

// sum + a · b for the odd column of each pair, then for the even one, each rounded once, to nearest even;
// takes subnormal numbers, also results, for zeros (Intel SDM volume 2, VDPBF16PS).
inline F32x16 add_dot_bf16(F32x16 sum, I32x16 a, I32x16 b) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}

// y = bias + x · wᵀ for P panels and R rows. Zen 4 reads the weights ahead by itself, a stream for each load
// instruction: unrolled they lost an eighth with one row, and asked for in advance a sixth with eight.
template <int P, int R>
void multiply_pairs(const Bf16Block& b) {
  F32x16 sum[R][P];
  for (int p = 0; p < P; ++p) {
    const F32x16 bias = bias_of(b, p);
    for (int r = 0; r < R; ++r) sum[r][p] = bias;
  }
  const uint16_t *weights = b.w, *rows = b.x;
  for (int64_t group = 0; group < b.groups; ++group, weights += kTileNumbers, rows += kTileNumbers) {
#pragma GCC unroll 1
    for (int k = 0; k < kPaddedCols; k += 2) {
      I32x16 w[P];
      for (int p = 0; p < P; ++p) w[p] = load_i32(weights + p * b.w_stride + 16 * k);
      for (int r = 0; r < R; ++r) {
        const I32x16 x = broadcast_i32(rows + r * kPaddedCols + k);
        for (int p = 0; p < P; ++p) sum[r][p] = add_dot_bf16(sum[r][p], w[p], x);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) store_channels(b.y + r * b.y_stride + 16 * p, sum[r][p], b.channels - 16 * p);
  }
}

using Bf16Function = void (*)(const Bf16Block&);

constexpr int kPairRows = 8;  // three panels of them, or four of up to six rows, fit the registers
static_assert(kRowTile % kPairRows == 0);

constexpr int pair_panels(int rows) {
  return kTileSums / rows < kMaxPanels ? kTileSums / rows : kMaxPanels;
}

template <int P, int R>
constexpr Bf16Function pairs_function() {
  if constexpr (P <= pair_panels(R)) {
    return multiply_pairs<P, R>;
  } else {
    return nullptr;
  }
}

template <int P>
constexpr Bf16Function kPairsOf[kPairRows] = {
    pairs_function<P, 1>(), pairs_function<P, 2>(), pairs_function<P, 3>(), pairs_function<P, 4>(),
    pairs_function<P, 5>(), pairs_function<P, 6>(), pairs_function<P, 7>(), pairs_function<P, 8>()};
constexpr const Bf16Function* kPairs[kMaxPanels] = {kPairsOf<1>, kPairsOf<2>, kPairsOf<3>, kPairsOf<4>};

void multiply_bf16(const LinearTask& t) {
  const int at_once = pair_panels(min_int(kPairRows, t.num_rows));
  for_resident_panels(t, at_once, kPairRows, [](const LinearTask& panels, int row) {
    const int rows = min_int(kPairRows, panels.num_rows - row), most = pair_panels(rows);
    for (int p = 0; p < panels.num_panels;) {
      const int left = panels.num_panels - p;
      const LinearTask part = panels_of(panels, p, left == most + 1 ? (left + 1) / 2 : most);
      kPairs[part.num_panels - 1][rows - 1](bf16_block(part, row, rows));
      p += part.num_panels;
    }
  });
}

void multiply_by_format(const LinearTask& t) {
  t.bf16 ? multiply_bf16(t) : multiply(t);
}

constexpr LinearKernels kLinearBf16 = {multiply_by_format, expand,        round_weights,
                                       quantise,           quantise_rows, round_to_bf16};

}  // namespace
}  // namespace engine
