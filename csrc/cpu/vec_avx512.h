// Sixteen f32 or i32 lanes with AVX-512 (F, BW, DQ, VL). Included by isa_avx512*.cpp and isa_amx.cpp alone,
// with one of dot_avx512*.h; see vec_scalar.h for the meaning.
#pragma once

// GCC 12 takes the intrinsics' deliberately undefined operands for a mistake (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

namespace engine {
namespace {

inline constexpr int kTileSums = 24;  // F32x16 that stay in registers beside a multiply's operands

struct F32x16 {
  __m512 v;
};
struct I32x16 {
  __m512i v;
};

inline F32x16 zero() {
  return {_mm512_setzero_ps()};
}
inline F32x16 broadcast(float x) {
  return {_mm512_set1_ps(x)};
}
inline F32x16 load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline F32x16 load_first(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
inline void store(float* p, F32x16 a) {
  _mm512_storeu_ps(p, a.v);
}
inline void store_first(float* p, F32x16 a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
inline F32x16 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_f16(uint16_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F32x16 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store_bf16(uint16_t* p, F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __m512i quiet_nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i wide = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet_nan), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(wide));
}

inline F32x16 operator+(F32x16 a, F32x16 b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return {_mm512_div_ps(a.v, b.v)};
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline F32x16 max(F32x16 a, F32x16 b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return {_mm512_min_ps(a.v, b.v)};
}
inline F32x16 where_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
inline F32x16 round(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F32x16 first(F32x16 a, int n, float rest) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(rest), static_cast<__mmask16>((1u << n) - 1), a.v)};
}
inline F32x16 scale_by_power(F32x16 a, F32x16 exponent) {
  return {_mm512_scalef_ps(a.v, exponent.v)};
}

inline I32x16 load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I32x16 load_i8(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I32x16 load_i32(const void* p) {
  return {_mm512_loadu_si512(p)};
}
inline void store_i32(void* p, I32x16 a) {
  _mm512_storeu_si512(p, a.v);
}
inline I32x16 zero_i32() {
  return {_mm512_setzero_si512()};
}
inline I32x16 broadcast_i32(const void* p) {
  return {_mm512_broadcastd_epi32(_mm_loadu_si32(p))};
}
inline void store_i8(int8_t* p, F32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline void store_u8(uint8_t* p, F32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
template <int Bit>
inline F32x16 xor_lanes(F32x16 a) {
  if constexpr (Bit == 1) return {_mm512_permute_ps(a.v, 0xb1)};
  if constexpr (Bit == 2) return {_mm512_permute_ps(a.v, 0x4e)};
  if constexpr (Bit == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  if constexpr (Bit == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}
inline I32x16 shift_right(I32x16 a, int bits) {
  return {_mm512_srli_epi32(a.v, static_cast<unsigned>(bits))};
}
inline I32x16 shift_left(I32x16 a, int bits) {
  return {_mm512_slli_epi32(a.v, static_cast<unsigned>(bits))};
}
inline I32x16 operator&(I32x16 a, int32_t mask) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi32(mask))};
}
inline I32x16 operator|(I32x16 a, I32x16 b) {
  return {_mm512_or_si512(a.v, b.v)};
}
inline I32x16 operator+(I32x16 a, I32x16 b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
inline I32x16 max(I32x16 a, I32x16 b) {
  return {_mm512_max_epi32(a.v, b.v)};
}
inline I32x16 bits(F32x16 a) {
  return {_mm512_castps_si512(a.v)};
}
inline F32x16 from_bits(I32x16 a) {
  return {_mm512_castsi512_ps(a.v)};
}
inline I32x16 subtract_bytes(I32x16 a, int byte) {
  return {_mm512_sub_epi8(a.v, _mm512_set1_epi8(static_cast<char>(byte)))};
}
inline F32x16 to_float(I32x16 a) {
  return {_mm512_cvtepi32_ps(a.v)};
}
inline constexpr float kByteScale = 0x1p-24f;
template <int Byte>
inline F32x16 byte_to_float(I32x16 a) {
  constexpr int top = (Byte << 24) | 0x00808080;  // 0x80: a zero
  const __m512i order = _mm512_set4_epi32(top + (12 << 24), top + (8 << 24), top + (4 << 24), top);
  return {_mm512_cvtepi32_ps(_mm512_shuffle_epi8(a.v, order))};
}

inline void to_lanes(F32x16 a, float* out) {
  _mm512_storeu_ps(out, a.v);
}
inline float sum(F32x16 a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float reduce_max(F32x16 a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
inline int32_t reduce_max(I32x16 a) {
  const __m256i eight = _mm256_max_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  __m128i b = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  b = _mm_max_epi32(b, _mm_shuffle_epi32(b, _MM_SHUFFLE(1, 0, 3, 2)));
  return _mm_cvtsi128_si32(_mm_max_epi32(b, _mm_shuffle_epi32(b, _MM_SHUFFLE(2, 3, 0, 1))));
}

}  // namespace
}  // namespace engine
