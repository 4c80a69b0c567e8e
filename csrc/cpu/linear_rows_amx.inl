// linear_rows.inl's multiply with the tiles of AMX: INT8 panels and rows of activations lie as tiles take
// them, 64 columns at a time, so both are loaded from where they are. Included by isa_amx.cpp alone, after
// linear_amx.inl.
#pragma once

#include "cpu/linear.h"

namespace engine {
namespace {

constexpr int kMinRowsForTiles = kMinTileRows;  // fewer are read faster without

// sums += x · w
template <int Sums, int X, int W>
inline void tile_multiply_add() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(X), "i"(W));
}
template <int Tile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

// Tiles 0 to 3 hold the sums of row tile r and panel p in number 2 · r + p, 4 and 5 activations, 6 and 7
// weights.
template <int R, int P>
void multiply_tiles(const LinearTask& t, int tile, int64_t ahead) {
  const RowTile* x[R];
  for (int r = 0; r < R; ++r) x[r] = row_tile(t, tile + r);
  const std::byte* w = t.panels + kHeaderBytes<BlockInt8>;
  tile_zero<0>();
  if constexpr (P == 2) tile_zero<1>();
  if constexpr (R == 2) tile_zero<2>();
  if constexpr (R == 2 && P == 2) tile_zero<3>();
  for (int64_t k = 0; k < t.cols; k += RowTile::kCols, w += sizeof(Panel<BlockInt8>) * RowTile::kCols / 32) {
    if (ahead > 0) {
      for (int p = 0; p < P; ++p)
        for (int64_t line = 0; line < 1024; line += 64)
          __builtin_prefetch(w + static_cast<size_t>(p) * t.panel_bytes + ahead + line);
    }
    tile_load<4>(x[0]->q(0, k), RowTile::kCols);
    tile_load<6>(w, 64);
    tile_multiply_add<0, 4, 6>();
    if constexpr (P == 2) {
      tile_load<7>(w + t.panel_bytes, 64);
      tile_multiply_add<1, 4, 7>();
    }
    if constexpr (R == 2) {
      tile_load<5>(x[1]->q(0, k), RowTile::kCols);
      tile_multiply_add<2, 5, 6>();
      if constexpr (P == 2) tile_multiply_add<3, 5, 7>();
    }
  }
  alignas(64) int32_t dots[R][P][kRowTile][16];
  tile_store<0>(dots[0][0], 64);
  if constexpr (P == 2) tile_store<1>(dots[0][1], 64);
  if constexpr (R == 2) tile_store<2>(dots[1][0], 64);
  if constexpr (R == 2 && P == 2) tile_store<3>(dots[1][1], 64);
  for (int p = 0; p < P; ++p) {
    const int channels = t.num_channels - 16 * p;
    const F32x16 w_scale = channel_scale(t.panels + static_cast<size_t>(p) * t.panel_bytes);
    const F32x16 bias = t.bias ? load_channels(t.bias + 16 * p, channels) : zero();
    for (int r = 0; r < R; ++r) {
      const int first_row = (tile + r) * kRowTile, rows = min_int(kRowTile, t.num_rows - first_row);
      float* y = t.y + first_row * t.y_stride + 16 * p;
      for (int i = 0; i < rows; ++i) {
        const I32x16 dot = load_i32(dots[r][p][i]) + broadcast_i32(&x[r]->start[i]);
        store_channels(y + i * t.y_stride, scale_dots(dot, x[r]->scale[i], w_scale, bias), channels);
      }
    }
  }
}

constexpr size_t kPanelBytesAtOnce = size_t{512} << 10;  // they stay in the second-level cache

// Panels that the cache holds: all of them for two row tiles before the next two, so that y is written in
// runs.
void multiply_panels_amx(const LinearTask& t) {
  const int tiles = (t.num_rows + kRowTile - 1) / kRowTile;
  for (int tile = 0; tile < tiles; tile += 2) {
    for (int p = 0; p < t.num_panels; p += 2) {
      const LinearTask part = panels_of(t, p, 2);
      const int64_t ahead = tile == 0 ? static_cast<int64_t>(t.panel_bytes) * part.num_panels : 0;
      const bool rows = tile + 1 < tiles;
      if (part.num_panels == 2)
        rows ? multiply_tiles<2, 2>(part, tile, ahead) : multiply_tiles<1, 2>(part, tile, ahead);
      else
        rows ? multiply_tiles<2, 1>(part, tile, ahead) : multiply_tiles<1, 1>(part, tile, ahead);
    }
  }
}

void multiply_rows_amx(const LinearTask& t) {
  prefetch_start(t, 2);
  configure_tiles(RowTile::kCols);
  const int at_once = static_cast<int>(kPanelBytesAtOnce / t.panel_bytes + 2) / 2 * 2;
  for (int p = 0; p < t.num_panels; p += at_once) multiply_panels_amx(panels_of(t, p, at_once));
  __asm__ volatile("tilerelease");
}

}  // namespace
}  // namespace engine
