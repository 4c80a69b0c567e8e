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

// The bits of the largest magnitude among 32 numbers; an infinity's or a NaN's are larger than any number's.
inline int32_t largest_bits(const float* x) {
  return reduce_max(max(bits(load(x)) & 0x7fffffff, bits(load(x + 16)) & 0x7fffffff));
}

// Σq of 32 columns, as a tile keeps it; two rows at a time.
inline void sum_quants(int rows, QuantisedTile& out) {
  constexpr int32_t four_ones = 0x01010101;
  const I32x16 ones = broadcast_i32(&four_ones);
  alignas(64) float sums[kRowTile][8];  // 16 columns' in each of four lanes
  for (int r = 0; r < rows; r += 2) {
    F32x16 fours =
        to_float(add_dot<true>(zero_i32(), ones, load_i32(out.q[r])));  // exact, as all that follows
    fours = fours + xor_lanes<1>(fours);
    to_lanes(fours + xor_lanes<2>(fours), sums[r]);
  }
  for (int r = 0; r < rows; ++r) {
    out.minus[1][r] = -static_cast<int32_t>(sums[r][0]);
    out.minus[2][r] = -static_cast<int32_t>(sums[r][4]);
    out.minus[0][r] = out.minus[1][r] + out.minus[2][r];
    out.sum[r] = out.scale[r] * static_cast<float>(-out.minus[0][r]);
  }
}

// 32 columns. An infinity or NaN makes its group's scale NaN, and with it every result of its row. What rows
// that do not exist would be in a tile is left as it was.
inline void quantise_group(const float* x, int64_t cols, int rows, QuantisedTile& out) {
  alignas(64) int32_t most_bits[kRowTile];
  for (int r = 0; r < rows; ++r) most_bits[r] = largest_bits(x + r * cols);
  alignas(64) float most[kRowTile], inverse[kRowTile];
  __builtin_memcpy(most, most_bits, sizeof most);
  for (int r = 0; r < rows; ++r) {
    const bool finite = most_bits[r] < 0x7f800000;
    inverse[r] = finite && most[r] > kSmallest ? 127.0f / most[r] : 0.0f;
    out.scale[r] = finite ? most[r] * (1.0f / 127) : __builtin_nanf("");
  }
  for (int r = 0; r < rows; ++r) {
    const F32x16 factor = broadcast(inverse[r]);
    auto* q = reinterpret_cast<int8_t*>(out.q[r]);
    store_i8(q, round(load(x + r * cols) * factor));
    store_i8(q + 16, round(load(x + r * cols + 16) * factor));
  }
}

// Sums come when all is stored: what was stored a moment ago in smaller pieces cannot be loaded at once.
void quantise(const float* x, int64_t cols, int rows, QuantisedTile* out) {
  const int64_t groups = cols / 32;
  for (int64_t g = 0; g < groups; ++g) quantise_group(x + 32 * g, cols, rows, out[g]);
  for (int64_t g = 0; g < groups; ++g) sum_quants(rows, out[g]);
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
  InPanel() = default;
  // Asks for what lies `ahead` bytes behind the group: a stream from memory that is asked for earlier runs
  // faster.
  InPanel(const void* panels, int64_t group, int64_t ahead)
      : panel_(blocks_of<Block>(panels) + group / Format::kGroups),
        first_(static_cast<int>(group % Format::kGroups) * Format::kScales) {
    if (ahead == 0) return;
    const std::byte* next = static_cast<const std::byte*>(panels) + group * kBytes + ahead;
    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(next + line);
  }
  I32x16 four(int s, int i) const { return quants(*panel_, first_ + s, i); }
  F32x16 scale_of(int s) const { return scale(*panel_, first_ + s); }
  F32x16 offset_of() const { return offset(*panel_, first_); }

 private:
  static constexpr int64_t kBytes = sizeof(Panel<Block>) / Format::kGroups;  // of a group, on average

  const Panel<Block>* panel_;
  int first_;
};

// 32 columns of a tile's rows from `row` on. Pointers to the first of them: what lies behind is then at an
// offset that the compiler knows, where an index would cost it a register for every number.
struct QuantisedRows {
  const int32_t (*q)[8];
  const float *scale, *sum;
  const int32_t* minus;

  QuantisedRows(const QuantisedTile& x, int row)
      : q(x.q + row), scale(x.scale + row), sum(x.sum + row), minus(x.minus[0] + row) {}
};

// -zero · Σq: where a sum of q · quant starts that is to end as the sum of q · (quant - zero).
template <class Block>
inline I32x16 start_of(const QuantisedRows& x, int row, int s) {
  constexpr int zero = BlockLayout<Block>::kZero;
  if constexpr (zero == 0) return zero_i32();
  const int part = Int8Layout<Block>::kScales == 1 ? 0 : 1 + s;
  return shift_left(broadcast_i32(x.minus + part * kRowTile + row), __builtin_ctz(zero | 1 << 8));
}

struct Int8Tile {
  const std::byte* w;  // panels, w_stride bytes apart
  size_t w_stride;
  int64_t ahead;  // bytes by which weights are asked for in advance; 0: they are there
  int64_t groups;
  const QuantisedTile* x;  // (groups)
  int first_row;           // of each one's kRowTile
  const float* bias;       // (channels) or null
  float* y;                // (R, channels), rows y_stride apart
  int64_t y_stride;
  int channels;  // of the 16 · P that exist
};

// sum += scale · x.scale · Σ x.q · (quant - zero) for scale number s of 32 columns.
template <class Block, int P, int R>
inline void add_products(const InPanel<Block> (&w)[P], const QuantisedRows& x, int s, F32x16 (&sum)[R][P]) {
  using Format = Int8Layout<Block>;
  I32x16 dots[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) dots[r][p] = start_of<Block>(x, r, s);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Format::kFours; ++i) {
    I32x16 four[P];
    for (int p = 0; p < P; ++p) four[p] = w[p].four(s, i);
    for (int r = 0; r < R; ++r) {
      const I32x16 q = broadcast_i32(&x.q[r][s * Format::kFours + i]);
      for (int p = 0; p < P; ++p) dots[r][p] = add_dot<Format::kSmallQuants>(dots[r][p], four[p], q);
    }
  }
  F32x16 scale[P];
  for (int p = 0; p < P; ++p) scale[p] = w[p].scale_of(s);
  for (int r = 0; r < R; ++r) {
    const F32x16 x_scale = broadcast(x.scale[r]);
    for (int p = 0; p < P; ++p) {
      const F32x16 dot = to_float(dots[r][p]);
      sum[r][p] = fma(kPerChannel<Block> ? dot : dot * scale[p], x_scale, sum[r][p]);
    }
  }
}

// sum += offset · x.sum
template <class Block, int P, int R>
inline void add_offsets(const InPanel<Block> (&w)[P], const QuantisedRows& x, F32x16 (&sum)[R][P]) {
  F32x16 offset[P];
  for (int p = 0; p < P; ++p) offset[p] = w[p].offset_of();
  for (int r = 0; r < R; ++r) {
    const F32x16 x_sum = broadcast(x.sum[r]);
    for (int p = 0; p < P; ++p) sum[r][p] = fma(offset[p], x_sum, sum[r][p]);
  }
}

// y = bias + x · wᵀ for P panels and R rows, whose sums stay in registers. Scales of whole channels come
// last.
template <class Block, int P, int R>
void multiply_tile_int8(const Int8Tile& t) {
  F32x16 sum[R][P], bias[P];
  for (int p = 0; p < P; ++p) {
    bias[p] = t.bias ? load_channels(t.bias + 16 * p, t.channels - 16 * p) : zero();
    for (int r = 0; r < R; ++r) sum[r][p] = kPerChannel<Block> ? zero() : bias[p];
  }
  for (int64_t group = 0; group < t.groups; ++group) {
    InPanel<Block> w[P];
    for (int p = 0; p < P; ++p) w[p] = {t.w + static_cast<size_t>(p) * t.w_stride, group, t.ahead};
    const QuantisedRows x(t.x[group], t.first_row);
    for (int s = 0; s < Int8Layout<Block>::kScales; ++s) add_products<Block>(w, x, s, sum);
    if constexpr (Int8Layout<Block>::kHasOffset) add_offsets(w, x, sum);
  }
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) {
      if constexpr (kPerChannel<Block>)
        sum[r][p] = fma(sum[r][p], channel_scale(t.w + static_cast<size_t>(p) * t.w_stride), bias[p]);
      store_channels(t.y + r * t.y_stride + 16 * p, sum[r][p], t.channels - 16 * p);
    }
  }
}

using Int8Function = void (*)(const Int8Tile&);

// Sums, integer and float, that fit the registers: two panels share what is loaded of x.
constexpr int kInt8Panels = kTileSums < 24 ? 1 : 2;
constexpr int kInt8Rows = kTileSums < 3 ? 1 : kTileSums / 3;
static_assert(kRowTile % kInt8Rows == 0);

// Null where the registers do not suffice.
template <class Block, int P, int R>
constexpr Int8Function int8_tile() {
  if constexpr (P <= kInt8Panels && R <= kInt8Rows) {
    return multiply_tile_int8<Block, P, R>;
  } else {
    return nullptr;
  }
}

template <class Block, int P>
constexpr Int8Function kInt8TilesOf[8] = {
    int8_tile<Block, P, 1>(), int8_tile<Block, P, 2>(), int8_tile<Block, P, 3>(), int8_tile<Block, P, 4>(),
    int8_tile<Block, P, 5>(), int8_tile<Block, P, 6>(), int8_tile<Block, P, 7>(), int8_tile<Block, P, 8>()};

template <class Block>
constexpr const Int8Function* kInt8Tiles[2] = {kInt8TilesOf<Block, 1>, kInt8TilesOf<Block, 2>};

// Panels that are read side by side end together: then the next ones' beginnings should be there.
inline int64_t ahead_of(const LinearTask& t) {
  constexpr int64_t nearby = 4096, farthest = int64_t{64} << 10;
  const auto next = static_cast<int64_t>(t.panel_bytes) * t.num_panels;
  return t.num_panels > 1 && next <= farthest ? next : nearby;
}

// At most kInt8Panels panels. They stay in the first-level cache from one tile of rows to the next.
void multiply_int8(const LinearTask& t) {
  for (int row = 0; row < t.num_rows; row += kInt8Rows) {
    const int rows = min_int(kInt8Rows, t.num_rows - row);
    Int8Tile tile{};
    tile.w = t.panels;
    tile.w_stride = t.panel_bytes;
    tile.ahead = row == 0 ? ahead_of(t) : 0;
    tile.groups = t.cols / 32;
    tile.x = t.quantised + row / kRowTile * tile.groups;
    tile.first_row = row % kRowTile;
    tile.bias = t.bias;
    tile.y = t.y + row * t.y_stride;
    tile.y_stride = t.y_stride;
    tile.channels = t.num_channels;
    visit_block(t.format, [&]<class Block>(Block) { kInt8Tiles<Block>[t.num_panels - 1][rows - 1](tile); });
  }
}

}  // namespace
}  // namespace engine
