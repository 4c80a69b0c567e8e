// What the two multiplies of BF16 weights with activations in bf16 share, that of tiles (linear_amx_bf16.inl)
// and that of vectors (linear_avx512bf16.inl): the rounding, and how a task is cut. Weights are read where
// they lie. Included by those two alone.
#pragma once

#include "cpu/linear.h"
#include "cpu/panel.inl"

namespace engine {
namespace {

constexpr size_t kResidentBytes = size_t{512} << 10;  // of weights, beside as many of activations
constexpr int64_t kTileNumbers = 16 * kPaddedCols;    // bf16 weights, or activations, in a tile: a kibibyte

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

// Panels and rows whose sums stay in registers.
struct Bf16Block {
  const uint16_t* w;  // panels, w_stride numbers apart
  int64_t w_stride;
  int64_t ahead;      // bytes by which weights are asked for in advance, or 0
  const uint16_t* x;  // (row tiles, groups, kRowTile, 32), from the first row on
  int64_t groups;
  const float* bias;  // (channels) or null
  float* y;           // (rows, channels), rows y_stride apart
  int64_t y_stride;
  int channels, rows;
};

// All panels of a task and its rows [row, row + count).
Bf16Block bf16_block(const LinearTask& t, int row, int count) {
  Bf16Block b{};
  b.w = reinterpret_cast<const uint16_t*>(t.panels);
  b.w_stride = static_cast<int64_t>(t.panel_bytes / sizeof *b.w);
  b.groups = (t.cols + 31) / 32;
  b.x = t.bf16[row / kRowTile * b.groups].x[row % kRowTile];
  b.bias = t.bias;
  b.y = t.y + row * t.y_stride;
  b.y_stride = t.y_stride;
  b.channels = t.num_channels;
  b.rows = min_int(count, t.num_rows - row);
  return b;
}

// y's channels start here.
inline F32x16 bias_of(const Bf16Block& b, int panel) {
  return b.bias ? load_channels(b.bias + 16 * panel, b.channels - 16 * panel) : zero();
}

// Panels that stay in the second-level cache, all of them for `rows_at_once` rows before the next ones: what
// is written of y then lies together. Calls multiply(panels, row).
template <class Multiply>
void for_resident_panels(const LinearTask& t, int panels_at_once, int rows_at_once, Multiply multiply) {
  const int resident =
      panels_at_once * (1 + static_cast<int>(kResidentBytes / t.panel_bytes) / panels_at_once);
  for (int first = 0; first < t.num_panels; first += resident) {
    const LinearTask panels = panels_of(t, first, resident);
    for (int row = 0; row < t.num_rows; row += rows_at_once) multiply(panels, row);
  }
}

}  // namespace
}  // namespace engine
