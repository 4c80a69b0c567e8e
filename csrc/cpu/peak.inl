// Included by isa_*.cpp; see peak.h for what each does.
#pragma once

#include "cpu/peak.h"

namespace engine {
namespace {

// Makes the compiler believe that what it computed is needed.
template <class T>
inline void keep(T& value) {
  __asm__ volatile("" : "+m"(value));
}

void peak_dot(int64_t rounds) {
  I32x16 sums[12], a = zero_i32();
  keep(a);
  for (I32x16& sum : sums) sum = zero_i32();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (I32x16& sum : sums) sum = add_dot<true>(sum, a, sum);  // not twice the same product
    __asm__ volatile("");
  }
  for (I32x16& sum : sums) keep(sum);
}

void peak_fma(int64_t rounds) {
  F32x16 sums[12], a = zero();
  keep(a);
  for (F32x16& sum : sums) sum = zero();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (F32x16& sum : sums) sum = fma(a, a, sum);
    __asm__ volatile("");
  }
  for (F32x16& sum : sums) keep(sum);
}

void peak_read(const void* data, size_t bytes) {
  const auto* p = static_cast<const char*>(data);
  I32x16 most[4] = {zero_i32(), zero_i32(), zero_i32(), zero_i32()};
  for (size_t i = 0; i < bytes; i += 256) {
    for (size_t line = 0; line < 4; ++line) {
      __builtin_prefetch(p + i + 64 * line + 4096);
      most[line] = max(most[line], load_i32(p + i + 64 * line));
    }
  }
  for (I32x16& m : most) keep(m);
}

constexpr PeakKernels kPeak = {peak_dot, peak_fma, peak_read};

}  // namespace
}  // namespace engine
