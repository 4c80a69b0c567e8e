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
  const float most = reduce_max(max(max(a, zero() - a), max(b, zero() - b)));
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
  InPanel() = default;
  InPanel(const void* panels, int64_t group)
      : panel_(static_cast<const Panel<Block>*>(panels) + group / Format::kGroups),
        first_(static_cast<int>(group % Format::kGroups) * Format::kScales) {
    const std::byte* ahead = static_cast<const std::byte*>(panels) + group * kBytes + kAhead;
    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + line);
  }
  I32x16 four(int s, int i) const { return quants(*panel_, first_ + s, i); }
  F32x16 scale_of(int s) const { return scale(*panel_, first_ + s); }
  F32x16 offset_of() const { return offset(*panel_, first_); }

 private:
  static constexpr int64_t kBytes = sizeof(Panel<Block>) / Format::kGroups;  // of a group, on average
  static constexpr int64_t kAhead = 2048;  // a stream from memory that is asked for earlier runs faster

  const Panel<Block>* panel_;
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
  Unpacked() = default;
  Unpacked(const void* groups, int64_t group)
      : group_(static_cast<const UnpackedGroup<Block>*>(groups) + group) {}
  I32x16 four(int s, int i) const { return load_i32(group_->q[s * Int8Layout<Block>::kFours + i]); }
  F32x16 scale_of(int s) const { return load(group_->scale[s]); }
  F32x16 offset_of() const { return load(group_->offset); }

 private:
  const UnpackedGroup<Block>* group_;
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
  const std::byte* w;  // InPanel's or Unpacked's, panels w_stride bytes apart
  size_t w_stride;
  int64_t groups;
  const QuantisedGroup* x;  // (groups, kRowTile)
  float* y;                 // (R, channels), rows y_stride apart
  int64_t y_stride;
  int channels;  // of the 16 · P that exist
};

// sum += scale · x.scale · Σ x.q · (quant - zero) for scale number s of 32 columns.
template <class Block, int P, int R, class Weights>
inline void add_products(const Weights (&w)[P], const QuantisedGroup* x, int s, F32x16 (&sum)[R][P]) {
  using Format = Int8Layout<Block>;
  I32x16 dots[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) dots[r][p] = start_of<BlockLayout<Block>::kZero>(x[r], s);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Format::kFours; ++i) {
    I32x16 four[P];
    for (int p = 0; p < P; ++p) four[p] = w[p].four(s, i);
    for (int r = 0; r < R; ++r) {
      const I32x16 q = broadcast_i32(x[r].q + 4 * (s * Format::kFours + i));
      for (int p = 0; p < P; ++p) dots[r][p] = add_dot<Format::kSmallQuants>(dots[r][p], four[p], q);
    }
  }
  F32x16 scale[P];
  for (int p = 0; p < P; ++p) scale[p] = w[p].scale_of(s);
  for (int r = 0; r < R; ++r) {
    const F32x16 x_scale = broadcast(x[r].scale);
    for (int p = 0; p < P; ++p) sum[r][p] = fma(to_float(dots[r][p]) * scale[p], x_scale, sum[r][p]);
  }
}

// sum += offset · x.sum
template <int P, int R, class Weights>
inline void add_offsets(const Weights (&w)[P], const QuantisedGroup* x, F32x16 (&sum)[R][P]) {
  F32x16 offset[P];
  for (int p = 0; p < P; ++p) offset[p] = w[p].offset_of();
  for (int r = 0; r < R; ++r) {
    const F32x16 x_sum = broadcast(x[r].sum);
    for (int p = 0; p < P; ++p) sum[r][p] = fma(offset[p], x_sum, sum[r][p]);
  }
}

// y += x · wᵀ for P panels and R rows, whose sums stay in registers.
template <class Block, template <class> class Weights, int P, int R>
void multiply_tile_int8(const Int8Tile& t) {
  F32x16 sum[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) sum[r][p] = load_channels(t.y + r * t.y_stride + 16 * p, t.channels - 16 * p);
  }
  const QuantisedGroup* x = t.x;
  for (int64_t group = 0; group < t.groups; ++group, x += kRowTile) {
    Weights<Block> w[P];
    for (int p = 0; p < P; ++p) w[p] = {t.w + static_cast<size_t>(p) * t.w_stride, group};
    for (int s = 0; s < Int8Layout<Block>::kScales; ++s) add_products<Block>(w, x, s, sum);
    if constexpr (Int8Layout<Block>::kHasOffset) add_offsets(w, x, sum);
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) store_channels(t.y + r * t.y_stride + 16 * p, sum[r][p], t.channels - 16 * p);
  }
}

using Int8Function = void (*)(const Int8Tile&);

// Sums, integer and float, that fit the registers: two panels share what is loaded of x.
constexpr int kInt8Panels = kTileSums < 24 ? 1 : 2;
constexpr int kInt8Rows = kTileSums < 3 ? 1 : kTileSums / 3;
static_assert(kRowTile % kInt8Rows == 0 && kTaskPanels % kInt8Panels == 0);

// Null where the registers do not suffice.
template <class Block, template <class> class Weights, int P, int R>
constexpr Int8Function int8_tile() {
  if constexpr (P <= kInt8Panels && R <= kInt8Rows) {
    return multiply_tile_int8<Block, Weights, P, R>;
  } else {
    return nullptr;
  }
}

template <class Block, template <class> class Weights, int P>
constexpr Int8Function kInt8TilesOf[kRowTile] = {
    int8_tile<Block, Weights, P, 1>(), int8_tile<Block, Weights, P, 2>(), int8_tile<Block, Weights, P, 3>(),
    int8_tile<Block, Weights, P, 4>(), int8_tile<Block, Weights, P, 5>(), int8_tile<Block, Weights, P, 6>(),
    int8_tile<Block, Weights, P, 7>(), int8_tile<Block, Weights, P, 8>()};

template <class Block, template <class> class Weights>
constexpr const Int8Function* kInt8Tiles[2] = {kInt8TilesOf<Block, Weights, 1>,
                                               kInt8TilesOf<Block, Weights, 2>};

// Where row `row` begins among the quantised groups.
inline const QuantisedGroup* quantised_row(const LinearTask& t, int row) {
  return t.quantised + row / kRowTile * (t.cols / 32) * kRowTile + row % kRowTile;
}

// A run of a task's panels that one kernel takes at once.
struct PanelRun {
  const std::byte* panels;
  int count;
  float* y;
  int channels;
};

// Groups [begin, begin + groups) of all rows.
template <class Block, template <class> class Weights>
void multiply_groups(const LinearTask& t, const PanelRun& run, const void* w, size_t w_stride, int64_t begin,
                     int64_t groups) {
  for (int row = 0; row < t.num_rows; row += kInt8Rows) {
    const int rows = min_int(kInt8Rows, t.num_rows - row);
    kInt8Tiles<Block, Weights>[run.count - 1][rows - 1]({static_cast<const std::byte*>(w), w_stride, groups,
                                                         quantised_row(t, row) + begin * kRowTile,
                                                         run.y + row * t.y_stride, t.y_stride, run.channels});
  }
}

constexpr int kUnpackRows = 2 * kInt8Rows;  // from here on unpacking pays
constexpr int kUnpackGroups = 16;  // at a time: with a tile's activations they stay in the first-level cache

template <class Block>
void multiply_unpacked(const LinearTask& t, const PanelRun& run) {
  UnpackedGroup<Block> w[kInt8Panels][kUnpackGroups];
  for (int64_t begin = 0; begin < t.cols / 32; begin += kUnpackGroups) {
    const int groups = min_int(kUnpackGroups, static_cast<int>(t.cols / 32 - begin));
    for (int p = 0; p < run.count; ++p) {
      const std::byte* panel = run.panels + static_cast<size_t>(p) * t.panel_bytes;
      for (int g = 0; g < groups; ++g) unpack_group(InPanel<Block>(panel, begin + g), w[p][g]);
    }
    multiply_groups<Block, Unpacked>(t, run, w, sizeof w[0], begin, groups);
  }
}

template <class Block>
void multiply_run(const LinearTask& t, const PanelRun& run) {
  if (t.num_rows >= kUnpackRows)
    multiply_unpacked<Block>(t, run);
  else
    multiply_groups<Block, InPanel>(t, run, run.panels, t.panel_bytes, 0, t.cols / 32);
}

void multiply_int8(const LinearTask& t) {
  for (int p = 0; p < t.num_panels; p += kInt8Panels) {
    const PanelRun run{t.panels + static_cast<size_t>(p) * t.panel_bytes,
                       min_int(kInt8Panels, t.num_panels - p), t.y + 16 * p, t.num_channels - 16 * p};
    visit_block(t.format, [&]<class Block>(Block) { multiply_run<Block>(t, run); });
  }
}

}  // namespace
}  // namespace engine
