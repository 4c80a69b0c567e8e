// Dot products of bytes with AVX-512 BW. Included by isa_avx512.cpp alone; see vec_scalar.h for the meaning.
#pragma once

#include "cpu/vec_avx512.h"

namespace engine {
namespace {

template <bool Small>
inline I32x16 add_dot(I32x16 sum, I32x16 a, I32x16 b) {
  if constexpr (Small) {  // two products fit 16 bits
    const __m512i pairs = _mm512_maddubs_epi16(a.v, b.v);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  } else {
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a.v, _mm512_set1_epi16(0xff)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(b.v, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a.v, 8), _mm512_srai_epi16(b.v, 8));
    return {_mm512_add_epi32(sum.v, _mm512_add_epi32(even, odd))};
  }
}

}  // namespace
}  // namespace engine
