// Sixteen f32 or i32 lanes in plain C++: what each operation means, and what runs where no vector unit is
// known. Every kernel is written once over these types (linear.inl, attention.inl, pointwise.inl) and
// compiled once per ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/quant.h"

namespace engine {
namespace {

inline constexpr int kTileSums = 1;  // F32x16 that stay in registers beside a multiply's operands

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};

template <class Lane>
inline F32x16 each(Lane lane) {
  F32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = lane(i);
  return r;
}
template <class Lane>
inline I32x16 each_int(Lane lane) {
  I32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = lane(i);
  return r;
}

inline F32x16 broadcast(float x) {
  return each([=](int) { return x; });
}
inline F32x16 zero() {
  return broadcast(0);
}
inline F32x16 load(const float* p) {
  return each([=](int i) { return p[i]; });
}
// The first n lanes from memory, 0 in the others; 0 <= n <= 16.
inline F32x16 load_first(const float* p, int n) {
  return each([=](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store(float* p, F32x16 a) {
  std::memcpy(p, a.v, sizeof a.v);
}
inline void store_first(float* p, F32x16 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
inline F32x16 load_f16(const uint16_t* p) {
  return each([=](int i) { return half_to_float(p[i]); });
}
inline void store_f16(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]);
}
inline F32x16 load_bf16(const uint16_t* p) {
  return each([=](int i) { return bfloat16_to_float(p[i]); });
}
inline void store_bf16(uint16_t* p, F32x16 a) {  // to nearest even
  for (int i = 0; i < 16; ++i) p[i] = float_to_bfloat16(a.v[i]);
}

inline F32x16 operator+(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c. Rounded twice here, once where the hardware fuses it.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// max and min give b where either is NaN.
inline F32x16 max(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// x where a < b, y elsewhere.
inline F32x16 where_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return each([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
inline F32x16 round(F32x16 a) {
  return each([&](int i) { return std::nearbyint(a.v[i]); });
}
// a in the first n lanes, `rest` in the others.
inline F32x16 first(F32x16 a, int n, float rest) {
  return each([&](int i) { return i < n ? a.v[i] : rest; });
}
// a · 2^exponent; exponent is an integer in [-126, 127].
inline F32x16 scale_by_power(F32x16 a, F32x16 exponent) {
  return each([&](int i) { return a.v[i] * std::exp2(exponent.v[i]); });
}

inline I32x16 load_u8(const uint8_t* p) {
  return each_int([=](int i) { return p[i]; });
}
inline I32x16 load_i8(const int8_t* p) {
  return each_int([=](int i) { return p[i]; });
}
inline I32x16 load_i32(const void* p) {
  I32x16 r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_i32(void* p, I32x16 a) {
  std::memcpy(p, a.v, sizeof a.v);
}
inline I32x16 zero_i32() {
  return each_int([](int) { return 0; });
}
// The four bytes at p in every lane.
inline I32x16 broadcast_i32(const void* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return each_int([=](int) { return x; });
}
// To sixteen bytes. Lanes are integers of -127 to 127; of others the byte is any.
inline void store_i8(int8_t* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = std::abs(a.v[i]) <= 127 ? static_cast<int8_t>(a.v[i]) : int8_t{0};
}
// To sixteen bytes, rounded. Lanes round to 0 to 255; of others the byte is any.
inline void store_u8(uint8_t* p, F32x16 a) {
  const F32x16 r = round(a);
  for (int i = 0; i < 16; ++i)
    p[i] = r.v[i] >= 0 && r.v[i] <= 255 ? static_cast<uint8_t>(r.v[i]) : uint8_t{0};
}
// Lane i is a's lane i ^ Bit.
template <int Bit>
inline F32x16 xor_lanes(F32x16 a) {
  return each([&](int i) { return a.v[i ^ Bit]; });
}
// sum + the dot product of each lane's four bytes, unsigned in a and signed in b, exactly. Small: those of a
// are below 64.
template <bool Small>
inline I32x16 add_dot(I32x16 sum, I32x16 a, I32x16 b) {
  uint8_t u[64];
  int8_t s[64];
  std::memcpy(u, a.v, sizeof u);
  std::memcpy(s, b.v, sizeof s);
  for (int i = 0; i < 64; ++i) sum.v[i / 4] += u[i] * s[i];
  return sum;
}
inline I32x16 shift_right(I32x16 a, int bits) {  // zeros come in
  return each_int([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> bits); });
}
inline I32x16 shift_left(I32x16 a, int bits) {
  return each_int([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << bits); });
}
inline I32x16 operator&(I32x16 a, int32_t mask) {
  return each_int([&](int i) { return a.v[i] & mask; });
}
inline I32x16 operator|(I32x16 a, I32x16 b) {
  return each_int([&](int i) { return a.v[i] | b.v[i]; });
}
inline I32x16 operator+(I32x16 a, I32x16 b) {
  return each_int([&](int i) { return a.v[i] + b.v[i]; });
}
inline I32x16 max(I32x16 a, I32x16 b) {
  return each_int([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline I32x16 bits(F32x16 a) {
  I32x16 r;
  std::memcpy(r.v, a.v, sizeof r.v);
  return r;
}
inline F32x16 from_bits(I32x16 a) {
  F32x16 r;
  std::memcpy(r.v, a.v, sizeof r.v);
  return r;
}
// Subtracts from each of the 64 bytes, modulo 256.
inline I32x16 subtract_bytes(I32x16 a, int byte) {
  uint8_t bytes[64];
  std::memcpy(bytes, a.v, sizeof bytes);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(b - byte);
  std::memcpy(a.v, bytes, sizeof bytes);
  return a;
}
inline F32x16 to_float(I32x16 a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
// Byte number `Byte` of each lane (0: the lowest), signed, divided by kByteScale: at the top of its lane a
// byte has its sign where an integer has it, which saves a shift.
inline constexpr float kByteScale = 0x1p-24f;
template <int Byte>
inline F32x16 byte_to_float(I32x16 a) {
  return to_float(shift_left(shift_right(a, 8 * Byte), 24));
}

inline void to_lanes(F32x16 a, float* out) {
  store(out, a);
}
// Pairwise, lane i with i + 8, then with i + 4, i + 2, i + 1: the same bits on every ISA.
inline float sum(F32x16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
// The largest lane; any of them where one is NaN.
inline float reduce_max(F32x16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
inline int32_t reduce_max(I32x16 a) {
  int32_t most = a.v[0];
  for (int32_t lane : a.v) most = lane > most ? lane : most;
  return most;
}

}  // namespace
}  // namespace engine
