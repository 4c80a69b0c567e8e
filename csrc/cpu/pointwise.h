// Kernels over single rows and flat runs of numbers.
#pragma once

#include <cstddef>

namespace engine {

struct PointwiseKernels {
  // out (size) = norm(x (size)) * weight (size) + bias (size, or null).
  using NormRow = void (*)(const float* x, const float* weight, const float* bias, float eps, float* out,
                           int size);
  // out (n) = act(x (n)), times up (n) unless that is null.
  using ActivationRow = void (*)(const float* x, const float* up, float* out, int n);

  NormRow norm[2];                                                         // by Norm
  ActivationRow activation[4];                                             // by Activation
  void (*add)(float* x, const float* delta, size_t n);                     // x += delta
  void (*add_share)(float* x, const float* delta, float share, size_t n);  // x += share * delta
  void (*scale)(float* x, float factor, size_t n);                         // x *= factor
  void (*clamp)(float* x, float limit, size_t n);                          // to ±limit; NaN stays
  float (*max)(const float* x, size_t n);  // -inf when empty; NaNs do not count
  void (*exp)(const float* x, float shift, float factor, float* out,
              size_t n);  // out = e^((x - shift) * factor)
};

}  // namespace engine
