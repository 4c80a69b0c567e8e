// The numbers of a key/value cache.
#pragma once

#include "base/check.h"
#include "base/quant.h"
#include "cuda/attention.h"
#include "cuda/common.cuh"

namespace engine::cuda {

struct KvF32 {
  using Stored = float;
  static constexpr bool kScaled = false;
  __device__ static float store(float x) { return x; }
  __device__ static float load(float x) { return x; }
};
struct KvF16 {
  using Stored = uint16_t;
  static constexpr bool kScaled = false;
  __device__ static uint16_t store(float x) { return float_to_half_bits(x); }
  __device__ static float load(uint16_t x) { return half_bits_to_float(x); }
};
struct KvBf16 {
  using Stored = uint16_t;
  static constexpr bool kScaled = false;
  __device__ static uint16_t store(float x) { return float_to_bf16_bits(x); }
  __device__ static float load(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
};
// Bytes, with a scale for each key and each value. A few numbers of a key are far larger than the others and
// would cost those their bits, so keys and queries are first rotated by a Hadamard matrix, which spreads them
// out and leaves every dot product what it was, times the matrix's size (as in QuaRot, arXiv 2404.00456).
struct KvInt8 {
  using Stored = int8_t;
  static constexpr bool kScaled = true;
  __device__ static int8_t store(float x) { return static_cast<int8_t>(rintf(x)); }
  __device__ static float load(int8_t x) { return x; }
};

template <class Visit>
void visit_kv_format(Format format, Visit visit) {
  if (format == Format::F32) return visit(KvF32{});
  if (format == Format::F16) return visit(KvF16{});
  if (format == Format::BF16) return visit(KvBf16{});
  check(format == Format::INT8, "a key/value cache is F32, F16, BF16 or INT8");
  visit(KvInt8{});
}

// The scales of a head's keys in a block: in `cache` at `keys`, behind its numbers. Its values' scales are
// kBlockSize further.
template <class Stored>
__device__ float kv_scale(View<const Stored> cache, size_t keys, int head_dim, int slot) {
  return cache.template load<float>(keys + static_cast<size_t>(2 * kBlockSize * head_dim + 4 * slot));
}

// Numbers of a head that are rotated together: the largest power of two that divides its size. Heads that are
// no multiple of 16 stay as they are.
__host__ __device__ inline int rotated_together(int head_dim) {
  return head_dim % 16 == 0 ? head_dim & -head_dim : 1;
}

// The fast Walsh-Hadamard transform of `rows` heads that lie `pitch` apart in x, by `threads` threads that
// wait for each other in barrier().
template <class Numbers, class Barrier>
__device__ void rotate_heads(Numbers& x, int start, int rows, int pitch, int head_dim, int thread,
                             int threads, Barrier barrier) {
  const int pairs = head_dim / 2;
  for (int h = 1; h < rotated_together(head_dim); h *= 2) {
    barrier();
    for (int i = thread; i < rows * pairs; i += threads) {
      const int first = start + i / pairs * pitch + i % pairs / h * 2 * h + i % pairs % h;
      const float a = x[first], b = x[first + h];
      x[first] = a + b;
      x[first + h] = a - b;
    }
  }
}

}  // namespace engine::cuda
