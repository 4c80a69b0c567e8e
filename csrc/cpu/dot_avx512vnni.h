// Dot products of bytes with AVX-512 VNNI. Included by isa_avx512vnni.cpp and isa_amx.cpp alone; see
// vec_scalar.h for the meaning.
#pragma once

#include "cpu/vec_avx512.h"

namespace engine {
namespace {

template <bool Small>
inline I32x16 add_dot(I32x16 sum, I32x16 a, I32x16 b) {
  return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
}

}  // namespace
}  // namespace engine
