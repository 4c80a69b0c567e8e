// How a weight lies in memory for the multiply. Sixteen output channels (kLanes) make a panel, which runs
// along the columns: for F32 and F16 one vector of sixteen per column, for BF16 one of sixteen pairs per two
// columns, for the quantised formats the sixteen channels' blocks, interleaved: Panel<Block>. A block keeps
// exactly its information and (Q4_K and Q5_K but for 3 %) its size.
//
// BF16's pairs are as AMX and AVX512-BF16 multiply them, and its columns are filled up with zeros to a
// multiple of kPaddedCols, a whole tile.
//
// Quants are unsigned. A 32-bit lane belongs to one channel and holds four consecutive columns as bytes, the
// first one lowest, or eight as nibbles: columns 0..3 in the low nibbles, 4..7 in the high ones. So one load,
// shift and mask gives what an integer dot product of four bytes takes, for any format.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/blocks.h"

namespace engine {

inline constexpr int kPaddedCols = 32;

template <class Block>
struct Panel;

// w = d · (q - 128)
template <>
struct Panel<BlockQ8_0> {
  uint16_t d[16];
  uint32_t q[8][16];  // [columns / 4][channel]
};

// w = d · (q - 8)
template <>
struct Panel<BlockQ4_0> {
  uint16_t d[16];
  uint32_t q[4][16];  // [columns / 8][channel]
};

// w = d · q + m
template <>
struct Panel<BlockQ4_1> {
  uint16_t d[16], m[16];
  uint32_t q[4][16];
};

// w = d · (q - 16). A quant's fifth bit is bit 8 · (column % 4) + column / 4 of high[channel].
template <>
struct Panel<BlockQ5_0> {
  uint16_t d[16];
  uint32_t high[16];
  uint32_t q[4][16];
};

// w = d · q + m
template <>
struct Panel<BlockQ5_1> {
  uint16_t d[16], m[16];
  uint32_t high[16];
  uint32_t q[4][16];
};

// w = d · scales[group] · q - dmin · mins[group]
template <>
struct Panel<BlockQ4_K> {
  uint16_t d[16], dmin[16];
  uint8_t scales[8][16], mins[8][16];
  uint32_t q[8][4][16];  // [group][columns / 8][channel]
};

// As Q4_K with a fifth bit, placed as in Q5_0. A group is read as one stream.
template <>
struct Panel<BlockQ5_K> {
  uint16_t d[16], dmin[16];
  uint8_t scales[8][16], mins[8][16];
  struct {
    uint32_t high[16];
    uint32_t q[4][16];
  } groups[8];
};

// w = d · scales[group] · (q - 32). A quant's two upper bits start at bit 8 · (column % 4) + 2 · (column / 4)
// of groups[group].high[channel], the column counted within its group of 16.
template <>
struct Panel<BlockQ6_K> {
  uint16_t d[16];
  int8_t scales[16][16];
  struct {
    uint32_t high[16];
    uint32_t q[2][16];
  } groups[16];
};

// w = scale · (q - 128), the scale being its channel's: those of all sixteen stand before the panel's blocks.
template <>
struct Panel<BlockInt8> {
  uint32_t q[8][16];
};

// Bytes before the first Panel<Block> of a panel: the scales of whole channels, f32.
template <class Block>
inline constexpr size_t kHeaderBytes = 0;
template <>
inline constexpr size_t kHeaderBytes<BlockInt8> = 16 * sizeof(float);

static_assert(sizeof(Panel<BlockQ8_0>) == 16 * sizeof(BlockQ8_0));
static_assert(sizeof(Panel<BlockQ4_0>) == 16 * sizeof(BlockQ4_0));
static_assert(sizeof(Panel<BlockQ4_1>) == 16 * sizeof(BlockQ4_1));
static_assert(sizeof(Panel<BlockQ5_0>) == 16 * sizeof(BlockQ5_0));
static_assert(sizeof(Panel<BlockQ5_1>) == 16 * sizeof(BlockQ5_1));
static_assert(sizeof(Panel<BlockQ4_K>) == 16 * (sizeof(BlockQ4_K) + 4));
static_assert(sizeof(Panel<BlockQ5_K>) == 16 * (sizeof(BlockQ5_K) + 4));
static_assert(sizeof(Panel<BlockQ6_K>) == 16 * sizeof(BlockQ6_K));
static_assert(sizeof(Panel<BlockInt8>) == 16 * sizeof(BlockInt8));

}  // namespace engine
