// The multiply of one LinearTask with BF16 weights and activations in bf16. With the tiles of AMX: sixteen
// rows times sixteen channels, summed over 32 columns by one instruction. One row takes vectors, which read
// memory faster, and compute what a tile would bit for bit. Included by isa_amx.cpp alone, after
// linear_amx.inl.
#pragma once

#include "cpu/linear_bf16.inl"

namespace engine {
namespace {

// sums += x · w, pair of columns after pair: exact products, f32 sums of the even and of the odd columns,
// added up in the end. Rounds to nearest even and takes subnormal numbers, also results, for zeros (Intel SDM
// volume 2, TDPBF16PS).
template <int Sums, int X, int W>
inline void tile_multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(X), "i"(W));
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

template <int Sums>
inline void start_sums(const Bf16Block& b, int panel) {
  alignas(64) float bias[16];
  store(bias, bias_of(b, panel));
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
    const uint16_t *w = b.w + group * kTileNumbers, *x = b.x + group * kTileNumbers;
    if (b.ahead > 0) {
      prefetch_tile(w, b.ahead);
      if constexpr (P == 2) prefetch_tile(w + b.w_stride, b.ahead);
    }
    tile_load<4>(x, 64);
    tile_load<6>(w, 64);
    tile_multiply_bf16<0, 4, 6>();
    if constexpr (P == 2) tile_load<7>(w + b.w_stride, 64);
    if constexpr (P == 2) tile_multiply_bf16<1, 4, 7>();
    if constexpr (R == 2) tile_load<5>(x + b.groups * kTileNumbers, 64);
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
  for (int p = 0; p < P; ++p) sum[p] = bias_of(b, p);
  for (int64_t group = 0; group < b.groups; ++group) {
    const uint16_t *w = b.w + group * kTileNumbers, *x = b.x + group * kTileNumbers;
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

// As ahead_of(), but farther: a tile is asked for in one go.
inline int64_t bf16_ahead_of(const LinearTask& t) {
  constexpr int64_t nearby = 8192;
  return ahead_of(t) > nearby ? ahead_of(t) : nearby;
}

void multiply_bf16_tiles(const LinearTask& t) {
  constexpr int panels_at_once = 2, rows_at_once = 2 * kRowTile;
  configure_bf16_tiles(min_int(kRowTile, t.num_rows));
  prefetch_start(t, panels_at_once);
  for_resident_panels(t, panels_at_once, rows_at_once, [](const LinearTask& panels, int row) {
    for (int p = 0; p < panels.num_panels; p += panels_at_once) {
      const LinearTask part = panels_of(panels, p, panels_at_once);
      Bf16Block block = bf16_block(part, row, rows_at_once);
      if (row == 0) block.ahead = bf16_ahead_of(part);
      kBf16Blocks[part.num_panels - 1][block.rows > kRowTile](block);
    }
  });
  __asm__ volatile("tilerelease");  // or the system would save them whenever another thread runs
}

void multiply_bf16(const LinearTask& t) {
  if (t.num_rows > 1) return multiply_bf16_tiles(t);
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040);  // subnormal numbers are zeros (FTZ and DAZ), as they are to tiles
  for (int p = 0; p < t.num_panels; p += kRowPanels) {
    const LinearTask part = panels_of(t, p, kRowPanels);
    kBf16Rows[part.num_panels - 1](bf16_block(part, 0, 1));
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
