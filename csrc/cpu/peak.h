// What one core can do at most: the yardstick of benchmarks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace engine {

inline constexpr int kPeakOps = 12 * 16;  // lanes that one round of the loops below works on

struct PeakKernels {
  // `rounds` rounds in registers: each multiplies and adds 4 · kPeakOps bytes (kPeakOps floats), in twelve
  // chains; of bytes about as many in tiles, where there are any.
  void (*dot)(int64_t rounds);
  void (*fma)(int64_t rounds);
  // Reads `bytes`, a multiple of 256.
  void (*read)(const void* data, size_t bytes);
};

}  // namespace engine
