// The multiply of one LinearTask, over F32x16: a chunk of columns is expanded into floats that stay in the
// first-level cache, and one f32 kernel runs over them, whatever the format. Plain floats need not be
// expanded. Included by isa_*.cpp after a vec_*.h. Integers take linear_int8.inl.

#include "cpu/linear.h"
#include "cpu/linear_int8.inl"
#include "cpu/linear_rows.inl"
#include "cpu/pack.inl"
#include "cpu/panel.inl"

namespace engine {
namespace {

constexpr int kChunk = 128;  // columns expanded at a time: 4 panels take 32 KiB

// A product of a quant and its scale is exact (at most 24 bits), so one rounding remains, that of the offset,
// and the result is dequantize_row()'s with and without fused multiply-add.
template <class Block>
inline void expand_group(const Panel<Block>& p, int group, F32x16 channels, float* out) {
  using Layout = BlockLayout<Block>;
  const F32x16 s = scale(p, group) * channels * broadcast(kByteScale);
  const F32x16 t = offset(p, group);
#pragma GCC unroll 8
  for (int four = 0; four < Layout::kGroup / 4; ++four, out += 64) {
    const I32x16 q = subtract_bytes(quants(p, group, four), Layout::kZero);
    store(out, fma(byte_to_float<0>(q), s, t));
    store(out + 16, fma(byte_to_float<1>(q), s, t));
    store(out + 32, fma(byte_to_float<2>(q), s, t));
    store(out + 48, fma(byte_to_float<3>(q), s, t));
  }
}

template <class Block>
void expand_quantised(const std::byte* panel, int64_t begin, int64_t end, float* out) {
  using Layout = BlockLayout<Block>;
  const auto* p = blocks_of<Block>(panel);
  const F32x16 channels = kPerChannel<Block> ? channel_scale(panel) : broadcast(1);
  for (int64_t k = begin; k < end; k += Layout::kGroup, out += 16 * Layout::kGroup) {
    expand_group(p[k / Layout::kCols], static_cast<int>(k % Layout::kCols / Layout::kGroup), channels, out);
  }
}

void expand_int8(const std::byte* panel, int64_t begin, int64_t end, float* out) {
  expand_quantised<BlockInt8>(panel, begin, end, out);
  for (int64_t k = begin; k < end; k += 64, out += 16 * 64) rotate_columns(out, end - k < 64 ? 32 : 64);
}

// The first and the second of each pair of bf16 numbers.
inline F32x16 even_of(I32x16 pairs) {
  return from_bits(shift_left(pairs, 16));
}
inline F32x16 odd_of(I32x16 pairs) {
  return from_bits(pairs & static_cast<int32_t>(0xffff0000));
}

// How a plain float format is read, sixteen channels of a column at a time. kTogether columns lie together;
// p is where they begin.
struct ReadF32 {
  using Number = float;
  static constexpr int kTogether = 1;
  static F32x16 read(const float* p, int) { return load(p); }
};
struct ReadF16 {
  using Number = uint16_t;
  static constexpr int kTogether = 1;
  static F32x16 read(const uint16_t* p, int) { return load_f16(p); }
};
struct ReadBF16 {
  using Number = uint16_t;
  static constexpr int kTogether = 2;
  static F32x16 read(const uint16_t* p, int column) {
    const I32x16 pairs = load_i32(p);
    return column == 0 ? even_of(pairs) : odd_of(pairs);
  }
};

template <class Read>
void expand_plain(const std::byte* panel, int64_t begin, int64_t end, float* out) {
  const auto* p = reinterpret_cast<const typename Read::Number*>(panel);
  for (int64_t k = begin; k < end; ++k, out += 16) {
    const int64_t column = k % Read::kTogether;
    store(out, Read::read(p + 16 * (k - column), static_cast<int>(column)));
  }
}

void expand(Format format, const std::byte* panel, int64_t begin, int64_t end, float* out) {
  switch (format) {
    case Format::F32:
      return expand_plain<ReadF32>(panel, begin, end, out);
    case Format::F16:
      return expand_plain<ReadF16>(panel, begin, end, out);
    case Format::BF16:
      return expand_plain<ReadBF16>(panel, begin, end, out);
    case Format::INT8:
      return expand_int8(panel, begin, end, out);
    default:
      visit_block(format, [=]<class Block>(Block) { expand_quantised<Block>(panel, begin, end, out); });
  }
}

struct Tile {
  const void* w;  // (panels, depth, 16), panels w_stride numbers apart
  int64_t w_stride;
  const float* x;  // (rows, depth), rows x_stride apart
  int64_t x_stride;
  float* y;  // (rows, channels), rows y_stride apart
  int64_t y_stride;
  int channels;
  int depth;
};

// y += x · wᵀ for P panels and R rows, whose sums stay in registers.
template <class Read, int P, int R>
void multiply_tile(const Tile& t) {
  const auto* weights = static_cast<const typename Read::Number*>(t.w);
  F32x16 sum[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) sum[r][p] = load_channels(t.y + r * t.y_stride + 16 * p, t.channels - 16 * p);
  }
  for (int k = 0; k < t.depth; k += Read::kTogether) {
#pragma GCC unroll 2
    for (int column = 0; column < Read::kTogether; ++column) {
      if (column > 0 && k + column == t.depth) break;
      F32x16 w[P];
      for (int p = 0; p < P; ++p) w[p] = Read::read(weights + p * t.w_stride + 16 * k, column);
      for (int r = 0; r < R; ++r) {
        const F32x16 x = broadcast(t.x[r * t.x_stride + k + column]);
        for (int p = 0; p < P; ++p) sum[r][p] = fma(w[p], x, sum[r][p]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) store_channels(t.y + r * t.y_stride + 16 * p, sum[r][p], t.channels - 16 * p);
  }
}

using TileFunction = void (*)(const Tile&);

constexpr int kMaxRows = 6, kMaxPanels = 4;

// Null where the sums of P panels and R rows would not fit the registers.
template <class Read, int P, int R>
constexpr TileFunction tile_function() {
  if constexpr (P * R <= kTileSums) {
    return multiply_tile<Read, P, R>;
  } else {
    return nullptr;
  }
}

template <class Read, int P>
constexpr TileFunction kTilesOf[kMaxRows] = {tile_function<Read, P, 1>(), tile_function<Read, P, 2>(),
                                             tile_function<Read, P, 3>(), tile_function<Read, P, 4>(),
                                             tile_function<Read, P, 5>(), tile_function<Read, P, 6>()};

template <class Read>
constexpr const TileFunction* kTiles[kMaxPanels] = {kTilesOf<Read, 1>, kTilesOf<Read, 2>, kTilesOf<Read, 3>,
                                                    kTilesOf<Read, 4>};

constexpr int kTileRows = kTileSums < kMaxRows ? kTileSums : kMaxRows;

// All panels of a task for up to kTileRows rows, as many panels at a time as the registers hold.
template <class Read>
void multiply_row_tile(Tile tile, int rows, int num_panels) {
  for (int p = 0; p < num_panels;) {
    const int panels = min_int(num_panels - p, kTileSums / rows);
    kTiles<Read>[panels - 1][rows - 1](tile);
    p += panels;
    tile.w = static_cast<const typename Read::Number*>(tile.w) + panels * tile.w_stride;
    tile.y += 16 * panels;
    tile.channels -= 16 * panels;
  }
}

template <class Read>
void multiply_chunk(const LinearTask& t, const void* w, int64_t w_stride, int64_t begin, int64_t end) {
  Tile tile{w, w_stride, t.x + begin, t.cols, t.y, t.y_stride, t.num_channels, static_cast<int>(end - begin)};
  for (int row = 0; row < t.num_rows; row += kTileRows) {
    multiply_row_tile<Read>(tile, min_int(kTileRows, t.num_rows - row), t.num_panels);
    tile.x += kTileRows * t.cols;
    tile.y += kTileRows * t.y_stride;
  }
}

inline int64_t chunk_end(const LinearTask& t, int64_t begin) {
  return t.cols - begin < kChunk ? t.cols : begin + kChunk;
}

// Reads the panels where they lie.
template <class Read>
void multiply_in_place(const LinearTask& t) {
  using Number = typename Read::Number;
  const auto* w = reinterpret_cast<const Number*>(t.panels);
  const auto w_stride = static_cast<int64_t>(t.panel_bytes / sizeof(Number));
  for (int64_t begin = 0; begin < t.cols; begin += kChunk) {
    multiply_chunk<Read>(t, w + 16 * begin, w_stride, begin, chunk_end(t, begin));
  }
}

void multiply_expanded(const LinearTask& t) {
  alignas(64) float w[kMaxPanels * 16 * kChunk];
  for (int64_t begin = 0; begin < t.cols; begin += kChunk) {
    const int64_t end = chunk_end(t, begin);
    for (int p = 0; p < t.num_panels; ++p) {
      expand(t.format, t.panels + static_cast<size_t>(p) * t.panel_bytes, begin, end, w + p * 16 * kChunk);
    }
    multiply_chunk<ReadF32>(t, w, 16 * kChunk, begin, end);
  }
}

// At most kMaxPanels panels.
void multiply_exactly(const LinearTask& t) {
  for (int r = 0; r < t.num_rows; ++r) {
    for (int i = 0; i < t.num_channels; ++i) t.y[r * t.y_stride + i] = t.bias ? t.bias[i] : 0.0f;
  }
  // With few rows a conversion is cheaper on the way, again for each tile, than in advance.
  const bool convert_on_the_way = t.num_rows <= 2 * kTileRows;
  if (t.format == Format::F32) return multiply_in_place<ReadF32>(t);
  if (t.format == Format::F16 && convert_on_the_way) return multiply_in_place<ReadF16>(t);
  if (t.format == Format::BF16 && convert_on_the_way) return multiply_in_place<ReadBF16>(t);
  multiply_expanded(t);
}

// Panels [first, first + count) of a task's.
LinearTask panels_of(LinearTask t, int first, int count) {
  t.panels += static_cast<size_t>(first) * t.panel_bytes;
  t.num_panels = min_int(count, t.num_panels - first);
  t.num_channels = min_int(16 * count, t.num_channels - 16 * first);
  if (t.bias) t.bias += 16 * first;
  t.y += 16 * first;
  return t;
}

// What is asked for in one go comes at the full speed of memory, what is waited for piece by piece does not.
void prefetch_start(const LinearTask& t, int at_once) {
  const int64_t bytes = ahead_of(panels_of(t, 0, at_once));
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(t.panels + line);
}

void multiply(const LinearTask& t) {
  const bool in_integers = t.quantised || t.by_row;
  const int at_once = in_integers ? (t.num_rows == 1 ? 1 : kInt8Panels) : kMaxPanels;
  if (in_integers) prefetch_start(t, at_once);
  for (int p = 0; p < t.num_panels; p += at_once) {
    const LinearTask part = panels_of(t, p, at_once);
    if (t.by_row)
      multiply_rows(part);
    else if (t.quantised)
      multiply_int8(part);
    else
      multiply_exactly(part);
  }
}

constexpr LinearKernels kLinear = {multiply, expand, round_weights, quantise, quantise_rows, nullptr};

}  // namespace
}  // namespace engine
