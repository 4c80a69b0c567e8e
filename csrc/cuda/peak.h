// What the GPU does at most: the yardstick of benchmarks.
#pragma once

#include <cstddef>

namespace engine::cuda {

struct Peaks {
  double read_gbs;  // GB/s read from memory
  // GMAC/s of the tensor cores, by the instructions that linear.cu has (Hopper's and Blackwell's own do
  // more).
  double bf16_gmacs;
  double dot_gmacs;  // of bytes
};

// bytes: what is read at a time, a multiple of 16; more than the caches hold. rounds: of matrix instructions,
// at most 2¹⁹. The best of several tries each. Throws InputError with cuda_problem().
Peaks measure_peaks(size_t bytes, int rounds);

}  // namespace engine::cuda
