// The multiply of one LinearTask in integers: bytes of activations times unsigned quants of weights, summed
// exactly over a group of columns; the groups' sums are scaled and added in f32, in order. So a result is the
// same on every ISA with fused multiply-add, whatever the number of rows. Included by linear.inl.
#pragma once

#include "cpu/linear.h"
#include "cpu/panel.inl"
#include "cpu/vec_math.inl"

namespace engine {
namespace {

inline int min_int(int a, int b) {
  return a < b ? a : b;
}

inline F32x16 load_channels(const float* y, int count) {
  return count < 16 ? load_first(y, count) : load(y);
}
inline void store_channels(float* y, F32x16 sum, int count) {
  count < 16 ? store_first(y, sum, count) : store(y, sum);
}

// The largest magnitude below which 127 / largest might overflow: a group of such numbers counts as zeros.
constexpr float kSmallest = 0x1p-100f;

// An infinity or NaN makes its group's scale NaN, and with it every result of its row.
inline void quantise_group(const float* x, QuantisedGroup& out) {
  const F32x16 a = load(x), b = load(x + 16);
  const float most = largest(max(max(a, zero() - a), max(b, zero() - b)));
  const F32x16 inverse = broadcast(most > kSmallest ? 127.0f / most : 0.0f);
  const F32x16 qa = round(a * inverse), qb = round(b * inverse);
  store_i8(out.q, qa);
  store_i8(out.q + 16, qb);
  const float sums[2] = {sum(qa), sum(qb)}, both = sums[0] + sums[1];  // exact, or NaN
  const bool finite = both - both == 0;
  out.scale = finite ? most * (1.0f / 127) : __builtin_nanf("");
  out.sum = out.scale * both;
  const int whole = finite ? static_cast<int>(both) : 0, half = finite ? static_cast<int>(sums[0]) : 0;
  out.minus_8 = -8 * whole;
  out.minus_16 = -16 * whole;
  out.minus_128 = -128 * whole;
  out.minus_32[0] = -32 * half;
  out.minus_32[1] = -32 * (whole - half);
}

void quantise(const float* x, int64_t cols, int rows, QuantisedGroup* out) {
  for (int r = 0; r < rows; ++r, x += cols) {
    for (int64_t g = 0; g < cols / 32; ++g) quantise_group(x + 32 * g, out[g * kRowTile + r]);
  }
}

// 32 columns of a panel: kScales scales (Q6_K has two), each over kFours runs of four columns.
template <class Block>
struct Int8Layout {
  using Layout = BlockLayout<Block>;
  static constexpr int kScales = 32 / Layout::kGroup;
  static constexpr int kFours = Layout::kGroup / 4;
  static constexpr int kGroups = Layout::kCols / 32;         // in a block
  static constexpr bool kHasOffset = Layout::kZero == 0;     // w = scale · q + offset
  static constexpr bool kSmallQuants = Layout::kZero < 128;  // they use at most six bits
};

// Read where they lie.
template <class Block>
class InPanel {
 public:
  using Format = Int8Layout<Block>;
  InPanel(const void* panels, int64_t group)
      : panel_(static_cast<const Panel<Block>*>(panels)[group / Format::kGroups]),
        first_(static_cast<int>(group % Format::kGroups) * Format::kScales) {}
  I32x16 four(int s, int i) const { return quants(panel_, first_ + s, i); }
  F32x16 scale_of(int s) const { return scale(panel_, first_ + s); }
  F32x16 offset_of() const { return offset(panel_, first_); }

 private:
  const Panel<Block>& panel_;
  int first_;
};

// Unpacked once for many rows.
template <class Block>
struct UnpackedGroup {
  alignas(64) uint32_t q[8][16];
  float scale[Int8Layout<Block>::kScales][16];
  float offset[16];
};

template <class Block>
class Unpacked {
 public:
  Unpacked(const void* groups, int64_t group)
      : group_(static_cast<const UnpackedGroup<Block>*>(groups)[group]) {}
  I32x16 four(int s, int i) const { return load_i32(group_.q[s * Int8Layout<Block>::kFours + i]); }
  F32x16 scale_of(int s) const { return load(group_.scale[s]); }
  F32x16 offset_of() const { return load(group_.offset); }

 private:
  const UnpackedGroup<Block>& group_;
};

template <class Block>
void unpack_group(const InPanel<Block>& from, UnpackedGroup<Block>& to) {
  using Format = Int8Layout<Block>;
  for (int s = 0; s < Format::kScales; ++s) {
    for (int i = 0; i < Format::kFours; ++i) store_i32(to.q[s * Format::kFours + i], from.four(s, i));
    store(to.scale[s], from.scale_of(s));
  }
  if constexpr (Format::kHasOffset) store(to.offset, from.offset_of());
}

// -zero · Σq: where a sum of q · quant starts that is to end as the sum of q · (quant - zero).
template <int Zero>
inline I32x16 start_of(const QuantisedGroup& x, int s) {
  if constexpr (Zero == 0) return zero_i32();
  if constexpr (Zero == 8) return broadcast_i32(&x.minus_8);
  if constexpr (Zero == 16) return broadcast_i32(&x.minus_16);
  if constexpr (Zero == 32) return broadcast_i32(&x.minus_32[s]);
  if constexpr (Zero == 128) return broadcast_i32(&x.minus_128);
}

struct Int8Tile {
  const void* w;  // InPanel's or Unpacked's
  int64_t groups;
  const QuantisedGroup* x;  // (groups, kRowTile)
  float* y;                 // (R, 16), rows y_stride apart
  int64_t y_stride;
  int channels;  // of the sixteen that exist
};

// y += x · wᵀ for a panel and R rows, whose sums stay in registers.
template <class Block, template <class> class Weights, int R>
void multiply_tile_int8(const Int8Tile& t) {
  using Format = Int8Layout<Block>;
  F32x16 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = load_channels(t.y + r * t.y_stride, t.channels);
  const QuantisedGroup* x = t.x;
  for (int64_t group = 0; group < t.groups; ++group, x += kRowTile) {
    const Weights<Block> w(t.w, group);
    for (int s = 0; s < Format::kScales; ++s) {
      I32x16 dots[R];
      for (int r = 0; r < R; ++r) dots[r] = start_of<BlockLayout<Block>::kZero>(x[r], s);
#pragma GCC unroll 8
      for (int i = 0; i < Format::kFours; ++i) {
        const I32x16 four = w.four(s, i);
        const int col = 4 * (s * Format::kFours + i);
        for (int r = 0; r < R; ++r)
          dots[r] = add_dot<Format::kSmallQuants>(dots[r], four, broadcast_i32(x[r].q + col));
      }
      const F32x16 scale = w.scale_of(s);
      for (int r = 0; r < R; ++r) sum[r] = fma(to_float(dots[r]) * scale, broadcast(x[r].scale), sum[r]);
    }
    if constexpr (Format::kHasOffset) {
      const F32x16 offset = w.offset_of();
      for (int r = 0; r < R; ++r) sum[r] = fma(offset, broadcast(x[r].sum), sum[r]);
    }
  }
  for (int r = 0; r < R; ++r) store_channels(t.y + r * t.y_stride, sum[r], t.channels);
}

using Int8Function = void (*)(const Int8Tile&);

// Rows whose sums, integer and float, fit the registers.
constexpr int kInt8Rows = kTileSums < 2 ? 1 : kTileSums / 2 < kRowTile ? kTileSums / 2 : kRowTile;
static_assert(kRowTile % kInt8Rows == 0);

// Null where the registers do not suffice.
template <class Block, int R>
constexpr Int8Function in_panel() {
  if constexpr (R <= kInt8Rows) {
    return multiply_tile_int8<Block, InPanel, R>;
  } else {
    return nullptr;
  }
}

template <class Block>
constexpr Int8Function kInPanel[kRowTile] = {
    in_panel<Block, 1>(), in_panel<Block, 2>(),  in_panel<Block, 3>(),  in_panel<Block, 4>(),
    in_panel<Block, 5>(), in_panel<Block, 6>(),  in_panel<Block, 7>(),  in_panel<Block, 8>(),
    in_panel<Block, 9>(), in_panel<Block, 10>(), in_panel<Block, 11>(), in_panel<Block, 12>()};

inline const QuantisedGroup* tile_of(const LinearTask& t, int row) {
  return t.quantised + row / kRowTile * (t.cols / 32) * kRowTile + row % kRowTile;
}

// Rows [begin, end) with the weights where they lie.
template <class Block>
void multiply_in_panels(const LinearTask& t, int begin, int end) {
  for (int p = 0; p < t.num_panels; ++p) {
    for (int row = begin; row < end; row += kInt8Rows) {
      const int rows = min_int(kInt8Rows, end - row);
      kInPanel<Block>[rows - 1]({t.panels + static_cast<size_t>(p) * t.panel_bytes, t.cols / 32,
                                 tile_of(t, row), t.y + row * t.y_stride + 16 * p, t.y_stride,
                                 t.num_channels - 16 * p});
    }
  }
}

constexpr int kUnpackGroups = 8;  // at a time: with a tile's activations they stay in the first-level cache

// Rows [0, end), whole tiles, with the weights unpacked.
template <class Block>
void multiply_unpacked(const LinearTask& t, int end) {
  UnpackedGroup<Block> groups[kTaskPanels][kUnpackGroups];
  for (int64_t begin = 0; begin < t.cols / 32; begin += kUnpackGroups) {
    const int count = min_int(kUnpackGroups, static_cast<int>(t.cols / 32 - begin));
    for (int p = 0; p < t.num_panels; ++p) {
      const std::byte* panel = t.panels + static_cast<size_t>(p) * t.panel_bytes;
      for (int g = 0; g < count; ++g) unpack_group(InPanel<Block>(panel, begin + g), groups[p][g]);
    }
    for (int row = 0; row < end; row += kInt8Rows) {
      const QuantisedGroup* x = tile_of(t, row) + begin * kRowTile;
      for (int p = 0; p < t.num_panels; ++p) {
        multiply_tile_int8<Block, Unpacked, kInt8Rows>(
            {groups[p], count, x, t.y + row * t.y_stride + 16 * p, t.y_stride, t.num_channels - 16 * p});
      }
    }
  }
}

void multiply_int8(const LinearTask& t) {
  // Unpacking pays from the second tile on.
  const int unpacked = t.num_rows < 2 * kInt8Rows ? 0 : t.num_rows / kInt8Rows * kInt8Rows;
  visit_block(t.format, [&]<class Block>(Block) {
    if (unpacked > 0) multiply_unpacked<Block>(t, unpacked);
    multiply_in_panels<Block>(t, unpacked, t.num_rows);
  });
}

}  // namespace
}  // namespace engine
