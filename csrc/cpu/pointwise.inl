// Norms, activations and the like, over F32x16. Included by isa_*.cpp; see pointwise.h for what each does.
#pragma once

#include "cpu/pointwise.h"
#include "cpu/vec_math.inl"

namespace engine {
namespace {

// Calls vector(i) for i = 0, 16, … while all sixteen lanes exist, then tail(i, n - i) if some are left.
template <class Vector, class Tail>
inline void for_lanes(size_t n, Vector vector, Tail tail) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16) vector(i);
  if (i < n) tail(i, static_cast<int>(n - i));
}

// out[i] = f(x[i]).
template <class F>
inline void map(const float* x, float* out, size_t n, F f) {
  for_lanes(
      n, [&](size_t i) { store(out + i, f(load(x + i))); },
      [&](size_t i, int rest) { store_first(out + i, f(load_first(x + i, rest)), rest); });
}

// Σ f(x[i]), where f(padding) is made 0. Four chains, because one would wait for the adder.
template <class F>
inline float sum_of(const float* x, int size, F f) {
  F32x16 chains[4] = {zero(), zero(), zero(), zero()};
  int i = 0;
  for (; i + 64 <= size; i += 64)
    for (int c = 0; c < 4; ++c) chains[c] = chains[c] + f(load(x + i + 16 * c));
  for (; i < size; i += 16) {
    const int rest = size - i < 16 ? size - i : 16;
    chains[0] = chains[0] + first(f(load_first(x + i, rest)), rest, 0);
  }
  return sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

// out = (x - shift) * factor * weight + bias.
inline void normalize(const float* x, float shift, float factor, const float* weight, const float* bias,
                      float* out, int size) {
  const F32x16 s = broadcast(shift), f = broadcast(factor);
  for (int i = 0; i < size; i += 16) {
    const int rest = size - i < 16 ? size - i : 16;
    F32x16 y = (load_first(x + i, rest) - s) * f * load_first(weight + i, rest);
    if (bias) y = y + load_first(bias + i, rest);
    store_first(out + i, y, rest);
  }
}

inline void rms_norm(const float* x, const float* weight, const float* bias, float eps, float* out,
                     int size) {
  const float mean_square = sum_of(x, size, [](F32x16 a) { return a * a; }) / static_cast<float>(size);
  normalize(x, 0, 1 / __builtin_sqrtf(mean_square + eps), weight, bias, out, size);
}

// The variance is taken around the mean in a second pass: E[x²] - E[x]² would cancel.
inline void layer_norm(const float* x, const float* weight, const float* bias, float eps, float* out,
                       int size) {
  const float mean = sum_of(x, size, [](F32x16 a) { return a; }) / static_cast<float>(size);
  const F32x16 m = broadcast(mean);
  const float variance =
      sum_of(x, size, [m](F32x16 a) { return (a - m) * (a - m); }) / static_cast<float>(size);
  normalize(x, mean, 1 / __builtin_sqrtf(variance + eps), weight, bias, out, size);
}

struct Silu {
  F32x16 operator()(F32x16 x) const { return x / (broadcast(1) + exp(zero() - x)); }
};

// x Φ(x) with Φ(-|x|) = erfc(|x|/√2) / 2, which keeps its relative accuracy where Φ is small.
struct Gelu {
  F32x16 operator()(F32x16 x) const {
    const F32x16 magnitude = max(zero() - x, x);
    const F32x16 tail = broadcast(0.5f) * x * erfc(magnitude * broadcast(0.70710678f));
    return where_less(x, zero(), tail, x - tail);
  }
};

// x (1 + tanh(u)) / 2 = x / (1 + e^(-2u)), u = √(2/π) (x + 0.044715 x³).
struct GeluTanh {
  F32x16 operator()(F32x16 x) const {
    const F32x16 cubic = fma(x * x, broadcast(0.044715f), broadcast(1)) * x;
    return x / (broadcast(1) + exp(cubic * broadcast(-1.5957691f)));
  }
};

struct Relu {
  F32x16 operator()(F32x16 x) const { return max(zero(), x); }
};

template <class Act>
inline void activate(const float* x, const float* up, float* out, int n) {
  const Act act{};
  if (!up) return map(x, out, static_cast<size_t>(n), act);
  for_lanes(
      static_cast<size_t>(n), [&](size_t i) { store(out + i, act(load(x + i)) * load(up + i)); },
      [&](size_t i, int rest) {
        store_first(out + i, act(load_first(x + i, rest)) * load_first(up + i, rest), rest);
      });
}

inline void add(float* x, const float* delta, size_t n) {
  for_lanes(
      n, [&](size_t i) { store(x + i, load(x + i) + load(delta + i)); },
      [&](size_t i, int rest) {
        store_first(x + i, load_first(x + i, rest) + load_first(delta + i, rest), rest);
      });
}

inline void add_share(float* x, const float* delta, float share, size_t n) {
  const F32x16 s = broadcast(share);
  for_lanes(
      n, [&](size_t i) { store(x + i, fma(load(delta + i), s, load(x + i))); },
      [&](size_t i, int rest) {
        store_first(x + i, fma(load_first(delta + i, rest), s, load_first(x + i, rest)), rest);
      });
}

inline void scale(float* x, float factor, size_t n) {
  map(x, x, n, [f = broadcast(factor)](F32x16 a) { return a * f; });
}

inline void clamp(float* x, float limit, size_t n) {
  map(x, x, n,
      [low = broadcast(-limit), high = broadcast(limit)](F32x16 a) { return min(high, max(low, a)); });
}

inline float max_of(const float* x, size_t n) {
  F32x16 most = broadcast(-__builtin_inff());
  for_lanes(
      n, [&](size_t i) { most = max(load(x + i), most); },
      [&](size_t i, int rest) { most = max(first(load_first(x + i, rest), rest, -__builtin_inff()), most); });
  return reduce_max(most);
}

inline void exp_of(const float* x, float shift, float factor, float* out, size_t n) {
  map(x, out, n, [s = broadcast(shift), f = broadcast(factor)](F32x16 a) { return exp((a - s) * f); });
}

constexpr PointwiseKernels kPointwise = {
    {rms_norm, layer_norm},
    {activate<Silu>, activate<Gelu>, activate<GeluTanh>, activate<Relu>},
    add,
    add_share,
    scale,
    clamp,
    max_of,
    exp_of,
};

}  // namespace
}  // namespace engine
