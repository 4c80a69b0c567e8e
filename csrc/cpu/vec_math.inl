// Functions of sixteen lanes that more than one kernel needs. Every lane is computed alike, so a result does
// not depend on the lane that it came by.
#pragma once

namespace engine {
namespace {

// The largest magnitude below which 127 / largest might overflow: such numbers count as zeros when they are
// quantised.
constexpr float kSmallest = 0x1p-100f;

// e^x to 1 ulp; 0 below -86.5 (where e^x nears the subnormal numbers), e^88.37 above 88.37; NaN stays NaN.
// Reduced to |r| <= ln(2)/2 by x = n ln(2) + r with ln(2) in two parts (Cody & Waite); then 1 + r + r² q(r),
// q being the degree-4 polynomial of least maximal relative error, 3e-9.
inline F32x16 exp(F32x16 x) {
  constexpr float lowest = -86.5f, highest = 88.37f;
  const F32x16 in = min(broadcast(highest), max(broadcast(lowest), x));
  const F32x16 n = round(in * broadcast(1.44269504f));
  F32x16 r = fma(n, broadcast(-0.693359375f), in);
  r = fma(n, broadcast(2.12194440e-4f), r);
  F32x16 q = broadcast(0.0013814599f);
  q = fma(q, r, broadcast(0.008368717f));
  q = fma(q, r, broadcast(0.04166839f));
  q = fma(q, r, broadcast(0.16666521f));
  q = fma(q, r, broadcast(0.49999994f));
  const F32x16 power = fma(q * r, r, r) + broadcast(1);
  return where_less(x, broadcast(lowest), zero(), scale_by_power(power, n));
}

// 2^x to a factor of 1 ± 7.5e-5 for x <= 0, of numbers that are rounded to eight bits afterwards; 2^-125
// below -125; NaN stays NaN. The polynomial of degree 3 is the one of least maximal relative error for |f| <=
// 1/2.
inline F32x16 rough_exp2(F32x16 x) {
  const F32x16 in = max(broadcast(-125), x);
  const F32x16 n = round(in), f = in - n;
  F32x16 power = broadcast(0.055171322f);
  power = fma(power, f, broadcast(0.24261133f));
  power = fma(power, f, broadcast(0.6932611f));
  power = fma(power, f, broadcast(0.99992806f));
  return scale_by_power(power, n);
}

// a in the lanes [begin, end), `rest` in the others.
inline F32x16 within(F32x16 a, int begin, int end, float rest) {
  static constexpr float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F32x16 lane = load(numbers), other = broadcast(rest);
  const F32x16 from = where_less(lane, broadcast(static_cast<float>(begin)), other, a);
  return where_less(lane, broadcast(static_cast<float>(end)), from, other);
}

// x[i ^ Bit] ± x[i]: one stage of the fast Walsh-Hadamard transform within a vector.
template <int Bit>
inline F32x16 butterfly(F32x16 x) {
  alignas(64) static constexpr auto signs = [] {
    struct {
      float lanes[16];
    } s{};
    for (int i = 0; i < 16; ++i) s.lanes[i] = i & Bit ? -1.0f : 1.0f;
    return s;
  }();
  return fma(x, load(signs.lanes), xor_lanes<Bit>(x));
}

// erfc(z) = t p(t) e^(-z²), t = 1 / (1 + 0.3 z), for z >= 0: the form of Abramowitz & Stegun 7.1.26, with the
// degree-8 polynomial of least maximal relative error, 2e-8 for z <= 9.5.
inline F32x16 erfc(F32x16 z) {
  const F32x16 t = broadcast(1) / fma(z, broadcast(0.3f), broadcast(1));
  F32x16 p = broadcast(-0.129434f);
  p = fma(p, t, broadcast(0.4850961f));
  p = fma(p, t, broadcast(-0.51122576f));
  p = fma(p, t, broadcast(0.5463943f));
  p = fma(p, t, broadcast(-0.09363074f));
  p = fma(p, t, broadcast(0.21443607f));
  p = fma(p, t, broadcast(0.14848249f));
  p = fma(p, t, broadcast(0.17069192f));
  p = fma(p, t, broadcast(0.16918962f));
  return t * p * exp(zero() - z * z);
}

}  // namespace
}  // namespace engine
