// The multiply of one LinearTask with BF16 weights and activations in bf16. With the tiles of AMX: sixteen
// rows times sixteen channels, summed over 32 columns by one instruction. One row takes vectors, which read
// memory faster, and compute what a tile would bit for bit. Weights are read where they lie. Included by
// isa_amx.cpp alone, after linear_amx.inl.
#pragma once

#include "cpu/linear.h"
#include "cpu/panel.inl"

namespace engine {
namespace {

constexpr size_t kResidentBytes = size_t{512} << 10;  // of weights, beside as many of activations
constexpr int64_t kTileNumbers = 16 * kPaddedCols;    // bf16 weights in a tile: a kibibyte

// sums += x · w, pair of columns after pair: exact products, f32 sums of the even and of the odd columns,
// added up in the end. Rounds to nearest even and takes subnormal numbers, also results, for zeros (Intel SDM
// volume 2, TDPBF16PS).
template <int Sums, int X, int W>
inline void tile_multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(X), "i"(W));
}

// What rows that do not exist would be in a tile is left as it was.
void round_to_bf16(const float* x, int64_t cols, int rows, Bf16Tile* out) {
  for (int64_t k = 0; k < cols; k += 32, ++out) {
    const int first = static_cast<int>(cols - k < 16 ? cols - k : 16);
    const int second = static_cast<int>(cols - k < 32 ? cols - k - first : 16);
    for (int r = 0; r < rows; ++r) {
      const float* from = x + r * cols + k;
      store_bf16(out->x[r], load_channels(from, first));
      store_bf16(out->x[r] + 16, load_channels(from + first, second));
    }
  }
}

// Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights, a pair of columns to a row.
inline void configure_bf16_tiles(int rows) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
    config.row_bytes[i] = 64;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

struct Bf16Block {
  const uint16_t* w;  // panels, w_stride numbers apart
  int64_t w_stride;
  int64_t ahead;      // bytes by which weights are asked for in advance; 0: they are there
  const Bf16Tile* x;  // (row tiles, groups)
  int64_t groups;
  const float* bias;  // (channels) or null
  float* y;           // (rows, channels), rows y_stride apart
  int64_t y_stride;
  int channels, rows;
};

template <int Sums>
inline void start_sums(const Bf16Block& b, int panel) {
  alignas(64) float bias[16] = {};
  if (b.bias) store(bias, load_channels(b.bias + 16 * panel, b.channels - 16 * panel));
  tile_load<Sums>(bias, 0);  // the same for every row
}

template <int Sums>
inline void store_sums(const Bf16Block& b, int row_tile, int panel) {
  float* y = b.y + row_tile * kRowTile * b.y_stride + 16 * panel;
  const int rows = min_int(kRowTile, b.rows - row_tile * kRowTile), channels = b.channels - 16 * panel;
  if (rows == kRowTile && channels >= 16)
    return tile_store<Sums>(y, b.y_stride * static_cast<int64_t>(sizeof(float)));
  alignas(64) float sums[kRowTile][16];
  tile_store<Sums>(sums, 64);
  for (int r = 0; r < rows; ++r) store_channels(y + r * b.y_stride, load(sums[r]), channels);
}

inline void prefetch_tile(const uint16_t* w, int64_t ahead) {
  const auto* next = reinterpret_cast<const std::byte*>(w) + ahead;
  for (int64_t line = 0; line < kTileNumbers * 2; line += 64) __builtin_prefetch(next + line);
}

// y = bias + x · wᵀ for P panels and R tiles of rows.
template <int P, int R>
void multiply_bf16_block(const Bf16Block& b) {
  start_sums<0>(b, 0);
  if constexpr (P == 2) start_sums<1>(b, 1);
  if constexpr (R == 2) start_sums<2>(b, 0);
  if constexpr (P == 2 && R == 2) start_sums<3>(b, 1);
  for (int64_t group = 0; group < b.groups; ++group) {
    const uint16_t* w = b.w + group * kTileNumbers;
    if (b.ahead > 0) {
      prefetch_tile(w, b.ahead);
      if constexpr (P == 2) prefetch_tile(w + b.w_stride, b.ahead);
    }
    tile_load<4>(b.x + group, 64);
    tile_load<6>(w, 64);
    tile_multiply_bf16<0, 4, 6>();
    if constexpr (P == 2) tile_load<7>(w + b.w_stride, 64);
    if constexpr (P == 2) tile_multiply_bf16<1, 4, 7>();
    if constexpr (R == 2) tile_load<5>(b.x + b.groups + group, 64);
    if constexpr (R == 2) tile_multiply_bf16<2, 5, 6>();
    if constexpr (P == 2 && R == 2) tile_multiply_bf16<3, 5, 7>();
  }
  store_sums<0>(b, 0, 0);
  if constexpr (P == 2) store_sums<1>(b, 0, 1);
  if constexpr (R == 2) store_sums<2>(b, 1, 0);
  if constexpr (P == 2 && R == 2) store_sums<3>(b, 1, 1);
}

using Bf16Function = void (*)(const Bf16Block&);
constexpr Bf16Function kBf16Blocks[2][2] = {{multiply_bf16_block<1, 1>, multiply_bf16_block<1, 2>},
                                            {multiply_bf16_block<2, 1>, multiply_bf16_block<2, 2>}};

// y = bias + x · wᵀ for P panels and one row, in the order of tile_multiply_bf16().
template <int P>
void multiply_bf16_row(const Bf16Block& b) {
  F32x16 sum[P];
  for (int p = 0; p < P; ++p) sum[p] = b.bias ? load_channels(b.bias + 16 * p, b.channels - 16 * p) : zero();
  for (int64_t group = 0; group < b.groups; ++group) {
    const uint16_t *w = b.w + group * kTileNumbers, *x = b.x[group].x[0];
    F32x16 even[P], odd[P];
    for (int p = 0; p < P; ++p) even[p] = odd[p] = zero();
#pragma GCC unroll 4
    for (int k = 0; k < kPaddedCols; k += 2) {
      const I32x16 pair = broadcast_i32(x + k);
      const F32x16 x_even = even_of(pair), x_odd = odd_of(pair);
      for (int p = 0; p < P; ++p) {
        const I32x16 pairs = load_i32(w + p * b.w_stride + 16 * k);
        even[p] = fma(even_of(pairs), x_even, even[p]);
        odd[p] = fma(odd_of(pairs), x_odd, odd[p]);
      }
    }
    for (int p = 0; p < P; ++p) sum[p] = sum[p] + (even[p] + odd[p]);
  }
  for (int p = 0; p < P; ++p) store_channels(b.y + 16 * p, sum[p], b.channels - 16 * p);
}

constexpr int kRowPanels = 4;  // read side by side
constexpr Bf16Function kBf16Rows[kRowPanels] = {multiply_bf16_row<1>, multiply_bf16_row<2>,
                                                multiply_bf16_row<3>, multiply_bf16_row<4>};

Bf16Block bf16_block(const LinearTask& t, int64_t ahead) {
  Bf16Block b{};
  b.w = reinterpret_cast<const uint16_t*>(t.panels);
  b.w_stride = static_cast<int64_t>(t.panel_bytes / sizeof *b.w);
  b.ahead = ahead;
  b.x = t.bf16;
  b.groups = (t.cols + 31) / 32;
  b.bias = t.bias;
  b.y = t.y;
  b.y_stride = t.y_stride;
  b.channels = t.num_channels;
  b.rows = t.num_rows;
  return b;
}

// As ahead_of(), but farther: a tile is asked for in one go.
inline int64_t bf16_ahead_of(const LinearTask& t) {
  constexpr int64_t nearby = 8192;
  return ahead_of(t) > nearby ? ahead_of(t) : nearby;
}

// Rows [first, first + count) of a task's, first a multiple of kRowTile.
LinearTask bf16_rows_of(LinearTask t, int first, int count) {
  t.bf16 += first / kRowTile * ((t.cols + 31) / 32);
  t.y += first * t.y_stride;
  t.num_rows = min_int(count, t.num_rows - first);
  return t;
}

// Panels that stay in the second-level cache, all of them for two tiles of rows before the next two: what is
// written of y then lies together.
void multiply_bf16_tiles(const LinearTask& t) {
  constexpr int at_once = 2;
  const int resident = 2 + static_cast<int>(kResidentBytes / t.panel_bytes) / 2 * 2;
  configure_bf16_tiles(min_int(kRowTile, t.num_rows));
  prefetch_start(t, at_once);
  for (int first = 0; first < t.num_panels; first += resident) {
    const LinearTask panels = panels_of(t, first, resident);
    for (int row = 0; row < t.num_rows; row += 2 * kRowTile) {
      const LinearTask rows = bf16_rows_of(panels, row, 2 * kRowTile);
      for (int p = 0; p < rows.num_panels; p += at_once) {
        const LinearTask part = panels_of(rows, p, at_once);
        const int64_t ahead = row == 0 ? bf16_ahead_of(part) : 0;
        kBf16Blocks[part.num_panels - 1][part.num_rows > kRowTile](bf16_block(part, ahead));
      }
    }
  }
  __asm__ volatile("tilerelease");  // or the system would save them whenever another thread runs
}

void multiply_bf16(const LinearTask& t) {
  if (t.num_rows > 1) return multiply_bf16_tiles(t);
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040);  // subnormal numbers are zeros (FTZ and DAZ), as they are to tiles
  for (int p = 0; p < t.num_panels; p += kRowPanels) {
    const LinearTask part = panels_of(t, p, kRowPanels);
    kBf16Rows[part.num_panels - 1](bf16_block(part, 0));
  }
  _mm_setcsr(mode);
}

void multiply_by_format(const LinearTask& t) {
  t.bf16 ? multiply_bf16(t) : multiply_amx(t);
}

constexpr LinearKernels kLinearAmx = {multiply_by_format, expand,        round_weights,
                                      quantise,           quantise_rows, round_to_bf16};

}  // namespace
}  // namespace engine
