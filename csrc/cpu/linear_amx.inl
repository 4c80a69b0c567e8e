// The multiply of one LinearTask in integers with the tiles of AMX: sixteen rows times sixteen channels,
// summed over one scale's columns, stored, and scaled by vector instructions, in the order of
// linear_int8.inl, so that the results are the same bit for bit. Included by isa_amx.cpp alone, after
// linear.inl, whose kernels take what has few rows.
//
// The unit of tiles and the vector unit work at a time: sums are stored two steps after they were asked for,
// and scaled after two more. While tiles are multiplied, one of the two ports for multiply-adds is closed.
// That is why integers become floats without a conversion (kMagic), which would need the other.
#pragma once

#include "cpu/linear.h"
#include "cpu/panel.inl"

namespace engine {
namespace {

// As LDTILECFG takes it (Intel SDM volume 1, chapter 18).
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

template <int Tile>
inline void tile_load(const void* rows, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(Tile) : "memory");
}
// sums = x · w
template <int Sums, int X, int W>
inline void tile_multiply() {
  __asm__ volatile("tilezero %%tmm%c0\n\ttdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(X), "i"(W));
}

constexpr int kMinRows = 24;  // of a task; fewer are as fast without tiles, whose weights are unpacked first
constexpr int kMinTileRows = 13;  // of its last tile
constexpr int kTiledCols = 2048;  // unpacked at a time: they stay in the second-level cache

// An integer below 2^22 in magnitude, added to the bits of this float, makes the bits of their sum.
constexpr float kMagic = 0x1.8p23f;

inline F32x16 magic_plus(const int32_t* dots) {
  const __m512i magic = _mm512_set1_epi32(__builtin_bit_cast(int32_t, kMagic));
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_load_si512(dots), magic))};
}

// The columns of one scale in one panel.
template <class Block>
struct alignas(64) TiledWeights {
  static constexpr int kCols = BlockLayout<Block>::kGroup;
  int32_t q[kCols / 4][16];  // four columns of each channel, as signed bytes
  float scale[16];
  float minus_magic[16];  // -kMagic · scale, which is exact: a scale has at most 19 bits
  float offset[16];
};

template <class Block>
void unpack(const std::byte* panel, int64_t begin, int64_t end, TiledWeights<Block>* out) {
  using Layout = BlockLayout<Block>;
  for (int64_t k = begin; k < end; k += Layout::kGroup, ++out) {
    const Panel<Block>& p = blocks_of<Block>(panel)[k / Layout::kCols];
    const int group = static_cast<int>(k % Layout::kCols / Layout::kGroup);
#pragma GCC unroll 8
    for (int i = 0; i < Layout::kGroup / 4; ++i) {
      store_i32(out->q[i], subtract_bytes(quants(p, group, i), Layout::kZero));
    }
    const F32x16 s = scale(p, group);
    store(out->scale, s);
    store(out->minus_magic, s * broadcast(-kMagic));
    store(out->offset, offset(p, group));
  }
}

// Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights, four columns to a row.
inline void configure_tiles(int cols) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < 6 ? kRowTile : cols / 4);
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? cols : 64);
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

// Multiplies tiles of sixteen rows by a panel, scale after scale, one tile after the other.
template <class Block>
class TileStream {
 public:
  using Format = Int8Layout<Block>;
  static constexpr int kInFlight = 4;  // steps from a multiply to its sums

  // x: the first of `groups` groups of each tile, tiles x_stride apart; w (groups · kScales)
  TileStream(const QuantisedTile* x, int64_t x_stride, const TiledWeights<Block>* w, int64_t groups,
             int tiles)
      : x_(x),
        x_skip_(x_stride - groups),
        w_(w),
        first_w_(w),
        last_w_(w + groups * Format::kScales),
        left_(tiles * groups * Format::kScales) {
    for (int i = 0; i < kInFlight; ++i) advance();
  }

  // The next tile's integer sums (16, 16), which stand until the next call but one.
  const int32_t (*next())[16] {
    const auto* sums = sums_[step_ % kInFlight];
    advance();
    return sums;
  }

 private:
  void advance() {
    switch (step_++ % kInFlight) {  // a tile's number is part of the instruction
      case 0:
        return step<0>();
      case 1:
        return step<1>();
      case 2:
        return step<2>();
      default:
        return step<3>();
    }
  }

  template <int Sums>
  void step() {
    constexpr int stored = (Sums + 2) % kInFlight, x = 4 + Sums % 2, w = 6 + Sums % 2;
    tile_store<stored>(sums_[stored], 64);
    if (left_ == 0) return;
    --left_;
    tile_load<x>(x_->q[0] + scale_ * Format::kFours, sizeof x_->q[0]);
    tile_load<w>(w_->q, 64);
    tile_multiply<Sums, x, w>();
    if (++scale_ == Format::kScales) {
      scale_ = 0;
      ++x_;
    }
    if (++w_ == last_w_) {
      w_ = first_w_;
      x_ += x_skip_;
    }
  }

  alignas(64) int32_t sums_[kInFlight][kRowTile][16];
  const QuantisedTile* x_;
  int64_t x_skip_;
  const TiledWeights<Block>*w_, *first_w_, *last_w_;
  int64_t left_;
  int scale_ = 0;  // of x_'s kScales
  unsigned step_ = 0;
};

// sum += scale · x.scale · dots, and after a group's last scale offset · x.sum
template <class Block>
inline void add_scaled(const int32_t (*dots)[16], const TiledWeights<Block>& w, const QuantisedTile& x,
                       F32x16 (&sum)[kRowTile]) {
  const F32x16 scale = load(w.scale), minus_magic = load(w.minus_magic), offset = load(w.offset);
#pragma GCC unroll 16
  for (int r = 0; r < kRowTile; ++r) {
    const F32x16 dot =
        kPerChannel<Block> ? to_float(load_i32(dots[r])) : fma(magic_plus(dots[r]), scale, minus_magic);
    sum[r] = fma(dot, broadcast(x.scale[r]), sum[r]);
    if constexpr (Int8Layout<Block>::kHasOffset) sum[r] = fma(offset, broadcast(x.sum[r]), sum[r]);
  }
}

// Asks for what lies one panel behind the columns of a scale.
template <class Block>
inline void prefetch_next(const LinearTask& t, int64_t begin) {
  constexpr int64_t bytes = sizeof(Panel<Block>) * TiledWeights<Block>::kCols / BlockLayout<Block>::kCols;
  const std::byte* next = t.panels + t.panel_bytes + begin / TiledWeights<Block>::kCols * bytes;
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + line);
}

// Columns [begin, end) of one panel and all rows: y = bias + x · wᵀ from the first column on, y += x · wᵀ
// from a later one; scales of whole channels come with the last.
template <class Block>
void multiply_cols(const LinearTask& t, int64_t begin, int64_t end, const TiledWeights<Block>* w) {
  const int64_t x_stride = t.cols / 32, groups = (end - begin) / 32;
  const int tiles = (t.num_rows + kRowTile - 1) / kRowTile;
  const F32x16 bias = t.bias ? load_channels(t.bias, t.num_channels) : zero();
  TileStream<Block> stream(t.quantised + begin / 32, x_stride, w, groups, tiles);
  for (int tile = 0; tile < tiles; ++tile) {
    const QuantisedTile* x = t.quantised + tile * x_stride + begin / 32;
    float* y = t.y + tile * kRowTile * t.y_stride;
    const int rows = min_int(kRowTile, t.num_rows - tile * kRowTile);
    F32x16 sum[kRowTile];
#pragma GCC unroll 16
    for (int r = 0; r < kRowTile; ++r) {
      sum[r] = kPerChannel<Block> ? zero() : bias;
      if (begin > 0 && r < rows) sum[r] = load_channels(y + r * t.y_stride, t.num_channels);
    }
    for (int64_t i = 0; i < groups * Int8Layout<Block>::kScales; ++i) {
      if (tile == 0) prefetch_next<Block>(t, begin + i * TiledWeights<Block>::kCols);
      add_scaled(stream.next(), w[i], x[i / Int8Layout<Block>::kScales], sum);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRowTile; ++r) {
      if (kPerChannel<Block> && end == t.cols) sum[r] = fma(sum[r], channel_scale(t.panels), bias);
      if (r < rows) store_channels(y + r * t.y_stride, sum[r], t.num_channels);
    }
  }
}

template <class Block>
void multiply_tiled(const LinearTask& t) {
  TiledWeights<Block> w[kTiledCols / TiledWeights<Block>::kCols];
  configure_tiles(TiledWeights<Block>::kCols);
  for (int p = 0; p < t.num_panels; ++p) {
    const LinearTask part = panels_of(t, p, 1);
    for (int64_t begin = 0; begin < t.cols; begin += kTiledCols) {
      const int64_t end = t.cols - begin < kTiledCols ? t.cols : begin + kTiledCols;
      unpack<Block>(part.panels, begin, end, w);
      multiply_cols(part, begin, end, w);
    }
  }
  __asm__ volatile("tilerelease");  // or the system would save them whenever another thread runs
}

}  // namespace
}  // namespace engine

#include "cpu/linear_rows_amx.inl"

namespace engine {
namespace {

// Rows [first, first + count) of a task's, first a multiple of kRowTile.
LinearTask rows_of(LinearTask t, int first, int count) {
  t.x += first * t.cols;
  t.quantised += first / kRowTile * (t.cols / 32);
  t.y += first * t.y_stride;
  t.num_rows = count;
  return t;
}

void multiply_amx(const LinearTask& t) {
  if (t.by_row && t.num_rows >= kMinRowsForTiles) return multiply_rows_amx(t);
  if (t.quantised == nullptr || t.num_rows < kMinRows) return multiply(t);
  const int rest = t.num_rows % kRowTile < kMinTileRows ? t.num_rows % kRowTile : 0;
  const LinearTask tiled = rows_of(t, 0, t.num_rows - rest);
  prefetch_start(tiled, 1);
  visit_block(t.format, [&]<class Block>(Block) { multiply_tiled<Block>(tiled); });
  if (rest > 0) multiply(rows_of(t, t.num_rows - rest, rest));
}

}  // namespace
}  // namespace engine
