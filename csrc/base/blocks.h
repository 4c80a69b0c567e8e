// What GGUF's blocks mean, one description per format, read by dequantize_row() and by the packer of weights:
// columns share a scale in groups, and w = scale · (q - kZero) + offset with q unsigned.
#pragma once

#include <cstring>

#include "base/quant.h"

namespace engine {

// Bytes 0..15 hold columns 0..15 in their low nibbles and columns 16..31 in their high nibbles.
inline void split_nibbles(const uint8_t* packed, uint8_t* q) {
  for (int i = 0; i < 16; ++i) q[i] = packed[i] & 15;
  for (int i = 0; i < 16; ++i) q[16 + i] = packed[i] >> 4;
}

// Bytes are taken eight at a time, which any compiler makes fast; what a shift moves from a byte into its
// neighbour, a mask takes away.
inline uint64_t eight(const uint8_t* bytes) {
  uint64_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}
inline void put_eight(uint8_t* bytes, uint64_t value) {
  std::memcpy(bytes, &value, sizeof value);
}
constexpr uint64_t every_byte(uint8_t byte) {
  return byte * uint64_t{0x0101010101010101};
}

// Bit i of the 32 is the fifth bit of column i.
inline void add_fifth_bits(const uint8_t (&bits)[4], uint8_t* q) {
  for (int i = 0; i < 4; ++i) {
    const uint64_t own = every_byte(bits[i]) & 0x8040201008040201;  // of each column, where it stood
    const uint64_t fifth = (own + every_byte(0x7f)) >> 3 & every_byte(0x10);
    put_eight(q + 8 * i, eight(q + 8 * i) | fifth);
  }
}

// Scales (which = 0) and mins (1) of Q4_K and Q5_K. Those of groups 0..3 are the low six bits of bytes 0..3
// and 4..7. Those of groups 4..7 have their low four bits in the nibbles of bytes 8..11, and their high two
// on top of the bytes of groups 0..3.
inline uint8_t six_bits(const uint8_t (&scales)[12], int which, int group) {
  if (group < 4) return scales[4 * which + group] & 63;
  const int low = (scales[4 + group] >> (4 * which)) & 15;
  return static_cast<uint8_t>(low | (scales[4 * which + group - 4] >> 6 << 4));
}

template <class Block>
struct BlockLayout;

template <class Block, int Zero>
struct SymmetricLayout {
  static constexpr int kCols = 32, kGroup = 32, kZero = Zero;
  static float scale(const Block& b, int) { return half_to_float(b.d); }
  static float offset(const Block&, int) { return -0.0f; }
};

template <class Block>
struct AffineLayout {
  static constexpr int kCols = 32, kGroup = 32, kZero = 0;
  static float scale(const Block& b, int) { return half_to_float(b.d); }
  static float offset(const Block& b, int) { return half_to_float(b.m); }
};

template <class Block>
struct SuperblockLayout {
  static constexpr int kCols = 256, kGroup = 32, kZero = 0;
  static float scale(const Block& b, int group) { return half_to_float(b.d) * six_bits(b.scales, 0, group); }
  static float offset(const Block& b, int group) {
    return -(half_to_float(b.dmin) * six_bits(b.scales, 1, group));
  }
};

template <>
struct BlockLayout<BlockQ8_0> : SymmetricLayout<BlockQ8_0, 128> {
  static void quants(const BlockQ8_0& b, int, uint8_t* q) {
    for (int i = 0; i < 32; ++i) q[i] = static_cast<uint8_t>(b.q[i] + 128);
  }
};

template <>
struct BlockLayout<BlockQ4_0> : SymmetricLayout<BlockQ4_0, 8> {
  static void quants(const BlockQ4_0& b, int, uint8_t* q) { split_nibbles(b.q, q); }
};

template <>
struct BlockLayout<BlockQ4_1> : AffineLayout<BlockQ4_1> {
  static void quants(const BlockQ4_1& b, int, uint8_t* q) { split_nibbles(b.q, q); }
};

template <>
struct BlockLayout<BlockQ5_0> : SymmetricLayout<BlockQ5_0, 16> {
  static void quants(const BlockQ5_0& b, int, uint8_t* q) {
    split_nibbles(b.q, q);
    add_fifth_bits(b.qh, q);
  }
};

template <>
struct BlockLayout<BlockQ5_1> : AffineLayout<BlockQ5_1> {
  static void quants(const BlockQ5_1& b, int, uint8_t* q) {
    split_nibbles(b.q, q);
    add_fifth_bits(b.qh, q);
  }
};

template <>
struct BlockLayout<BlockQ4_K> : SuperblockLayout<BlockQ4_K> {
  static void quants(const BlockQ4_K& b, int group, uint8_t* q) {
    const uint8_t* packed = b.q + 32 * (group / 2);  // of two groups: one in the low nibbles, one in the high
    const int shift = 4 * (group % 2);
    for (int i = 0; i < 32; ++i) q[i] = (packed[i] >> shift) & 15;
  }
};

template <>
struct BlockLayout<BlockQ5_K> : SuperblockLayout<BlockQ5_K> {
  static void quants(const BlockQ5_K& b, int group, uint8_t* q) {
    const uint8_t* packed = b.q + 32 * (group / 2);
    const int shift = 4 * (group % 2);
    for (int i = 0; i < 32; ++i) {
      q[i] = static_cast<uint8_t>(((packed[i] >> shift) & 15) | (((b.qh[i] >> group) & 1) << 4));
    }
  }
};

template <>
struct BlockLayout<BlockQ6_K> {
  static constexpr int kCols = 256, kGroup = 16, kZero = 32;
  static float scale(const BlockQ6_K& b, int group) { return half_to_float(b.d) * b.scales[group]; }
  static float offset(const BlockQ6_K&, int) { return -0.0f; }
  // Of each half (128 columns): ql's 64 bytes hold columns 0..63 low and 64..127 high; qh's 32 bytes hold the
  // upper bits of four runs of 32 columns.
  static void quants(const BlockQ6_K& b, int group, uint8_t* q) {
    const int half = group / 8, col = 16 * (group % 8);
    const uint8_t* low = b.ql + 64 * half + col % 64;
    const uint8_t* high = b.qh + 32 * half + col % 32;
    for (int i = 0; i < 16; i += 8) {
      const uint64_t upper = eight(high + i) >> (col / 32 * 2) & every_byte(3);
      put_eight(q + i, (eight(low + i) >> (col / 64 * 4) & every_byte(15)) | upper << 4);
    }
  }
};

template <>
struct BlockLayout<BlockInt8> {
  static constexpr int kCols = 32, kGroup = 32, kZero = 128;
  static float scale(const BlockInt8&, int) { return 1; }  // its row's scale stands before the blocks
  static float offset(const BlockInt8&, int) { return -0.0f; }
  static void quants(const BlockInt8& b, int, uint8_t* q) {
    for (int i = 0; i < 32; ++i) q[i] = static_cast<uint8_t>(b.q[i] + 128);
  }
};

// visit(Block{}) with the block type of a quantised format; plain floats have none and are not visited.
template <class Visit>
void visit_block(Format format, Visit visit) {
  switch (format) {
    case Format::Q8_0:
      return visit(BlockQ8_0{});
    case Format::Q4_0:
      return visit(BlockQ4_0{});
    case Format::Q4_1:
      return visit(BlockQ4_1{});
    case Format::Q5_0:
      return visit(BlockQ5_0{});
    case Format::Q5_1:
      return visit(BlockQ5_1{});
    case Format::Q4_K:
      return visit(BlockQ4_K{});
    case Format::Q5_K:
      return visit(BlockQ5_K{});
    case Format::Q6_K:
      return visit(BlockQ6_K{});
    case Format::INT8:
      return visit(BlockInt8{});
    case Format::F32:
    case Format::F16:
    case Format::BF16:
      return;
  }
}

}  // namespace engine
