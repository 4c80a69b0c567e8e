// The multiply of one LinearTask in integers where all columns share a scale: INT8 weights, with one for each
// channel, and activations with one for each row. What is summed is then one integer, exact in any order, so
// every ISA, tile and number of rows gives the same bits.
//
// A few activations are far larger than the others of their row and would cost those their bits. So both
// sides are rotated by Hadamard matrices of 64 columns (the last 32 may be left for one of their own), which
// spread them out and leave every dot product what it was, times the matrix's size, by which the weights were
// divided when they were packed (as in QuaRot, arXiv 2404.00456). Included by linear.inl.
#pragma once

#include "cpu/linear.h"
#include "cpu/panel.inl"
#include "cpu/vec_math.inl"

namespace engine {
namespace {

template <int Vectors>
inline void rotate_vectors(F32x16 (&v)[Vectors]) {
  for (F32x16& a : v) a = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(a))));
  for (int h = 1; h < Vectors; h *= 2) {
    for (int i = 0; i < Vectors; ++i) {
      if (i & h) continue;
      const F32x16 a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

// Rotates `count` columns of a panel, a power of two of them. Twice gives `count` times what was.
inline void rotate_columns(float* columns, int count) {
  for (int h = 1; h < count; h *= 2) {
    for (int i = 0; i < count; ++i) {
      if (i & h) continue;
      const F32x16 a = load(columns + 16 * i), b = load(columns + 16 * (i + h));
      store(columns + 16 * i, a + b);
      store(columns + 16 * (i + h), a - b);
    }
  }
}

// out = x rotated; most_bits, a vector's lanes, are raised to the bits of the largest magnitudes.
template <int Vectors>
inline void rotate_block(const float* x, float* out, I32x16& most_bits) {
  F32x16 v[Vectors];
  for (int i = 0; i < Vectors; ++i) v[i] = load(x + 16 * i);
  rotate_vectors(v);
  for (int i = 0; i < Vectors; ++i) {
    most_bits = max(bits(v[i]) & 0x7fffffff, most_bits);
    store(out + 16 * i, v[i]);
  }
}

// An infinity or NaN makes its row's scale NaN, and with it every result of the row.
inline void quantise_row(const float* x, int64_t cols, int row, float* rotated, RowTile* out) {
  I32x16 most_bits = zero_i32();
  int64_t k = 0;
  for (; k + 64 <= cols; k += 64) rotate_block<4>(x + k, rotated + k, most_bits);
  if (k < cols) rotate_block<2>(x + k, rotated + k, most_bits);

  const int32_t largest = reduce_max(most_bits);
  const float most = __builtin_bit_cast(float, largest);
  const bool finite = largest < 0x7f800000;
  const F32x16 inverse = broadcast(finite && most > kSmallest ? 127.0f / most : 0.0f);
  F32x16 total = zero();  // exact: at most 127 · cols
  for (k = 0; k < cols; k += 16) {
    const F32x16 q = round(load(rotated + k) * inverse);
    store_i8(out->q(row, k), q);
    total = total + q;
  }
  for (; k % 64 != 0; k += 16) store_i8(out->q(row, k), zero());
  out->scale[row] = finite ? most * (1.0f / 127) : __builtin_nanf("");
  out->start[row] = finite ? -128 * static_cast<int32_t>(sum(total)) : 0;
}

void quantise_rows(const float* x, int64_t cols, int rows, float* rotated, RowTile* out) {
  for (int r = 0; r < rows; ++r) quantise_row(x + r * cols, cols, r, rotated, out);
}

// What is left to do once a dot product of unsigned bytes stands, sixteen channels at a time.
inline F32x16 scale_dots(I32x16 dots, float x_scale, F32x16 w_scale, F32x16 bias) {
  return fma(to_float(dots) * broadcast(x_scale), w_scale, bias);
}

struct RowsTile {
  const std::byte* w;  // panels, w_stride bytes apart
  size_t w_stride;
  int64_t ahead;  // bytes by which weights are asked for in advance
  int64_t fours;  // runs of four columns
  const RowTile* x;
  int first_row;
  const float* bias;  // (channels) or null
  float* y;           // (R, channels), rows y_stride apart
  int64_t y_stride;
  int channels;  // of the 16 · P that exist
};

// A few sums, each of every so many columns: one alone would wait for itself.
template <int P, int R>
constexpr int kChains = P * R >= 4 ? 1 : 4;

// y = bias + x · wᵀ for P panels and R rows.
template <int P, int R>
void multiply_rows_tile(const RowsTile& t) {
  constexpr int chains = kChains<P, R>;
  I32x16 dots[chains][R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) {
      dots[0][r][p] = broadcast_i32(&t.x->start[t.first_row + r]);
      for (int c = 1; c < chains; ++c) dots[c][r][p] = zero_i32();
    }
  }
  const int8_t* q = t.x->q(t.first_row, 0);
  const std::byte* w = t.w + kHeaderBytes<BlockInt8>;
  for (int64_t i = 0; i < t.fours; i += chains) {
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c, w += 64) {
      I32x16 four[P];
      for (int p = 0; p < P; ++p) {
        const std::byte* at = w + static_cast<size_t>(p) * t.w_stride;
        four[p] = load_i32(at);
        __builtin_prefetch(at + t.ahead);
      }
      const int8_t* columns = q + RowTile::at(4 * (i + c));
      for (int r = 0; r < R; ++r) {
        const I32x16 x = broadcast_i32(columns + RowTile::kCols * r);
        for (int p = 0; p < P; ++p) dots[c][r][p] = add_dot<false>(dots[c][r][p], four[p], x);
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    const F32x16 w_scale = channel_scale(t.w + static_cast<size_t>(p) * t.w_stride);
    const F32x16 bias = t.bias ? load_channels(t.bias + 16 * p, t.channels - 16 * p) : zero();
    for (int r = 0; r < R; ++r) {
      I32x16 dot = dots[0][r][p];
      for (int c = 1; c < chains; ++c) dot = dot + dots[c][r][p];
      store_channels(t.y + r * t.y_stride + 16 * p,
                     scale_dots(dot, t.x->scale[t.first_row + r], w_scale, bias), t.channels - 16 * p);
    }
  }
}

using RowsFunction = void (*)(const RowsTile&);

template <int P>
constexpr RowsFunction kRowsTilesOf[8] = {
    multiply_rows_tile<P, 1>, multiply_rows_tile<P, 2>, multiply_rows_tile<P, 3>, multiply_rows_tile<P, 4>,
    multiply_rows_tile<P, 5>, multiply_rows_tile<P, 6>, multiply_rows_tile<P, 7>, multiply_rows_tile<P, 8>};

constexpr const RowsFunction* kRowsTiles[2] = {kRowsTilesOf<1>, kRowsTilesOf<2>};

inline const RowTile* row_tile(const LinearTask& t, int index) {
  return t.by_row + index * RowTile::units(t.cols);
}

// At most kInt8Panels panels. They stay in the first-level cache from one tile of rows to the next.
void multiply_rows(const LinearTask& t) {
  for (int row = 0; row < t.num_rows; row += kInt8Rows) {
    RowsTile tile{};
    tile.w = t.panels;
    tile.w_stride = t.panel_bytes;
    tile.ahead = row == 0 ? ahead_of(t) : 0;
    tile.fours = t.cols / 4;
    tile.x = row_tile(t, row / kRowTile);
    tile.first_row = row % kRowTile;
    tile.bias = t.bias;
    tile.y = t.y + row * t.y_stride;
    tile.y_stride = t.y_stride;
    tile.channels = t.num_channels;
    kRowsTiles[t.num_panels - 1][min_int(kInt8Rows, t.num_rows - row) - 1](tile);
  }
}

}  // namespace
}  // namespace engine
