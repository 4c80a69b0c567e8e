// y = x · Wᵀ + bias with weights that stay in their stored format, packed once into panels (panel.h).
//
// Exactly: expanded to the numbers of dequantize_row() while they are multiplied; every output is one chain
// of multiply-adds over the columns in order, starting at the bias. Or in integers, for quantised weights:
// activations become bytes, 32 columns sharing a scale, and every output is a chain over those groups in
// order; for INT8, whose channels have one scale each, so have the rows of activations (linear_rows.inl). Or
// in bf16, for BF16 weights with AMX or AVX512-BF16: activations become bf16 (to nearest even), products are
// exact, and sums round to nearest even and take subnormal numbers for zeros, whatever the thread's mode.
// With AMX every output is a chain in f32 over 32 columns at a time, whose even and odd ones are chains of
// their own; with AVX512-BF16 one chain over pairs of columns, the odd one of each first. Elsewhere such
// weights are multiplied exactly. Each way depends neither on the number of rows or threads, nor, the first
// two, on whether AVX2, AVX-512 or AMX runs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/tensor.h"
#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "device/device.h"

namespace engine {

inline constexpr int kRowTile = 16;  // rows whose rounded activations lie together

// 32 columns of kRowTile rows of activations: x ≈ scale · q with q = -127 … 127, the largest of them ±127.
struct alignas(64) QuantisedTile {
  int32_t q[kRowTile][8];  // bytes of four consecutive columns
  float scale[kRowTile];
  float sum[kRowTile];         // scale · Σq, for weights with an offset
  int32_t minus[3][kRowTile];  // -Σq of all columns, of the first 16, of the last 16: for weights with a zero
                               // point
};
static_assert(sizeof(QuantisedTile) == 832);

// kRowTile rows of activations, rotated, each x ≈ scale · q: what INT8 weights are multiplied with. Their
// bytes stand behind it, (cols / 64 rounded up, kRowTile, 64), columns beyond the last being zeros.
struct alignas(64) RowTile {
  static constexpr int kCols = 64;  // that lie together

  float scale[kRowTile];
  int32_t start[kRowTile];  // -128 Σq: where a sum of q · (w + 128) starts that is to end as that of q · w

  static constexpr int64_t at(int64_t col) { return col / kCols * (kRowTile * kCols) + col % kCols; }
  int8_t* q(int row, int64_t col) { return reinterpret_cast<int8_t*>(this + 1) + kCols * row + at(col); }
  const int8_t* q(int row, int64_t col) const { return const_cast<RowTile*>(this)->q(row, col); }
  // How many RowTiles have room for one with its bytes.
  static constexpr int64_t units(int64_t cols) { return 1 + (cols + kCols - 1) / kCols * 8; }
};
static_assert(8 * sizeof(RowTile) == kRowTile * RowTile::kCols);

// 32 columns of kRowTile rows of activations in bf16.
struct alignas(64) Bf16Tile {
  uint16_t x[kRowTile][32];
};

// Where linear() and linear_experts() put rounded activations; it grows to the largest need.
struct RoundedRows {
  std::vector<QuantisedTile> groups;  // (row tiles, cols / 32)
  std::vector<RowTile> rows;          // (row tiles, RowTile::units(cols))
  std::vector<float> rotated;         // (threads, cols)
  std::vector<Bf16Tile> bf16;         // (row tiles, ⌈cols / 32⌉)
};

// One thread's share: a run of panels times a run of rows.
struct LinearTask {
  Format format;
  const std::byte* panels;  // (num_panels, panel_bytes)
  size_t panel_bytes;
  int num_panels;
  int num_channels;  // of the panels' 16 · num_panels that exist
  int64_t cols;
  const float* bias;               // (num_channels) or null
  const float* x;                  // (num_rows, cols)
  const QuantisedTile* quantised;  // x as (row tiles, cols / 32), or null
  const RowTile* by_row;           // x as (row tiles, RowTile::units(cols)), or null
  const Bf16Tile* bf16;            // x as (row tiles, ⌈cols / 32⌉), or null; all three null: exactly
  int num_rows;
  float* y;  // (num_rows, num_channels), rows y_stride apart
  int64_t y_stride;
};

struct LinearKernels {
  void (*multiply)(const LinearTask& task);
  // out (end - begin, 16): columns begin to end of one panel, as floats. Both ends are multiples of 32, but
  // that plain floats end where they end.
  void (*expand)(Format format, const std::byte* panel, int64_t begin, int64_t end, float* out);
  // The other way: all columns of sixteen channels, (cols, 16), to a panel of the format, as quantize_row()
  // rounds them. INT8 weights are rotated first, in place.
  void (*round_weights)(Format format, float* columns, int64_t cols, std::byte* panel);
  // x (rows, cols) to out (cols / 32); at most kRowTile rows, cols a multiple of 32.
  void (*quantise)(const float* x, int64_t cols, int rows, QuantisedTile* out);
  // The same with a scale for each row; rotated (cols) is scratch.
  void (*quantise_rows)(const float* x, int64_t cols, int rows, float* rotated, RowTile* out);
  // x (rows, cols) to out (⌈cols / 32⌉), filled up with zeros; at most kRowTile rows. Null where BF16 weights
  // are multiplied exactly.
  void (*round_to_bf16)(const float* x, int64_t cols, int rows, Bf16Tile* out);
};

// The sources stacked by rows, each in its own format. They agree in `cols`; `bias` has one number per row or
// is empty.
std::unique_ptr<Weight> pack_weight(const Kernels& kernels, ThreadPool& pool, Arena& arena,
                                    std::span<const Tensor> sources, std::span<const float> bias,
                                    Arithmetic arithmetic);

// y (n, weight.rows) = x (n, weight.cols) · weightᵀ + bias.
void linear(const Kernels& kernels, ThreadPool& pool, const Weight& weight, const float* x, float* y, int n,
            RoundedRows& scratch);

// y (rows, weight.rows / experts): rows [first_rows[e], first_rows[e + 1]) of x (rows, weight.cols) times the
// matrix of expert e, which is as many rows of the weight as any other's, from sources of its own. first_rows
// (experts + 1).
void linear_experts(const Kernels& kernels, ThreadPool& pool, const Weight& weight,
                    std::span<const int32_t> first_rows, const float* x, float* y, RoundedRows& scratch);

// out (tokens.size(), table.cols): rows of `table`, bit for bit as dequantize_row() gives them, without the
// bias.
void embed(const Kernels& kernels, const Weight& table, std::span<const int32_t> tokens, float* out);

}  // namespace engine
