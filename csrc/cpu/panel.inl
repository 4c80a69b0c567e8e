// How a panel's quants, scales and offsets are read, sixteen channels at a time. Included by linear.inl and
// linear_int8.inl.
#pragma once

#include "cpu/panel.h"

namespace engine {
namespace {

// Four columns' unsigned quants, number `four` of a group, as the bytes of each channel's lane.
inline I32x16 nibbles(const uint32_t (*q)[16], int four) {
  return shift_right(load_i32(q[four / 2]), four % 2 * 4) & 0x0f0f0f0f;
}
inline I32x16 fifth_bits(const uint32_t (&high)[16], int four) {
  return shift_left(shift_right(load_i32(high), four) & 0x01010101, 4);
}
inline I32x16 quants(const Panel<BlockQ8_0>& p, int, int four) {
  return load_i32(p.q[four]);
}
inline I32x16 quants(const Panel<BlockQ4_0>& p, int, int four) {
  return nibbles(p.q, four);
}
inline I32x16 quants(const Panel<BlockQ4_1>& p, int, int four) {
  return nibbles(p.q, four);
}
inline I32x16 quants(const Panel<BlockQ5_0>& p, int, int four) {
  return nibbles(p.q, four) | fifth_bits(p.high, four);
}
inline I32x16 quants(const Panel<BlockQ5_1>& p, int, int four) {
  return nibbles(p.q, four) | fifth_bits(p.high, four);
}
inline I32x16 quants(const Panel<BlockQ4_K>& p, int group, int four) {
  return nibbles(p.q[group], four);
}
inline I32x16 quants(const Panel<BlockQ5_K>& p, int group, int four) {
  return nibbles(p.groups[group].q, four) | fifth_bits(p.groups[group].high, four);
}
inline I32x16 quants(const Panel<BlockQ6_K>& p, int group, int four) {
  const I32x16 upper = shift_right(load_i32(p.groups[group].high), 2 * four) & 0x03030303;
  return nibbles(p.groups[group].q, four) | shift_left(upper, 4);
}

inline I32x16 quants(const Panel<BlockInt8>& p, int, int four) {
  return load_i32(p.q[four]);
}

template <class Block>
const Panel<Block>* blocks_of(const void* panel) {
  return reinterpret_cast<const Panel<Block>*>(static_cast<const std::byte*>(panel) + kHeaderBytes<Block>);
}
template <class Block>
inline constexpr bool kPerChannel = kHeaderBytes<Block> > 0;
// The channels' own scales, where a format has them.
inline F32x16 channel_scale(const void* panel) {
  return load(static_cast<const float*>(panel));
}

template <class Block>
inline F32x16 scale(const Panel<Block>& p, int) {
  return load_f16(p.d);
}
inline F32x16 scale(const Panel<BlockInt8>&, int) {
  return broadcast(1);
}
inline F32x16 scale(const Panel<BlockQ4_K>& p, int group) {
  return load_f16(p.d) * to_float(load_u8(p.scales[group]));
}
inline F32x16 scale(const Panel<BlockQ5_K>& p, int group) {
  return load_f16(p.d) * to_float(load_u8(p.scales[group]));
}
inline F32x16 scale(const Panel<BlockQ6_K>& p, int group) {
  return load_f16(p.d) * to_float(load_i8(p.scales[group]));
}

template <class Block>
inline F32x16 offset(const Panel<Block>&, int) {
  return broadcast(-0.0f);  // the one number whose addition changes nothing, not even a zero's sign
}
inline F32x16 offset(const Panel<BlockQ4_1>& p, int) {
  return load_f16(p.m);
}
inline F32x16 offset(const Panel<BlockQ5_1>& p, int) {
  return load_f16(p.m);
}
template <class Block>
inline F32x16 minus_min(const Panel<Block>& p, int group) {
  return load_f16(p.dmin) * to_float(load_u8(p.mins[group])) * broadcast(-1);
}
inline F32x16 offset(const Panel<BlockQ4_K>& p, int group) {
  return minus_min(p, group);
}
inline F32x16 offset(const Panel<BlockQ5_K>& p, int group) {
  return minus_min(p, group);
}

}  // namespace
}  // namespace engine
