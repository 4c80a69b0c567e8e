// The numbers of a key/value cache, and how they lie in it: as the matrix instructions want them, so that a
// warp's loads are wide and contiguous and nothing passes through shared memory.
//
// A square is 16 keys by 16 of a head's numbers. A lane has eight numbers of it, which lie together: of keys
// the two fragments of 8 keys that scores sum up over a head's numbers, of values the two of 8 numbers that a
// result sums up over keys. Heads are filled up with zeros to whole squares.
#pragma once

#include "base/check.h"
#include "base/quant.h"
#include "cuda/attention.h"
#include "cuda/common.cuh"

namespace engine::cuda {

inline constexpr int kSquare = 16, kSquareNumbers = kSquare * kSquare, kLaneNumbers = 8;

__host__ __device__ inline int squares(int head_dim) {
  return (head_dim + kSquare - 1) / kSquare;
}

// Of row k and column n of a square that is a matrix instruction's right operand.
__device__ inline int in_square(int n, int k) {
  return (n % 8 * 4 + k % 8 / 2) * kLaneNumbers + n / 8 * 4 + k / 8 * 2 + k % 2;
}
// Where in a head's part of a block a number is.
__device__ inline int key_number(int slot, int d) {
  return d / kSquare * kSquareNumbers + in_square(slot, d % kSquare);
}
__device__ inline int value_number(int head_dim, int slot, int d) {
  return (squares(head_dim) + d / kSquare) * kSquareNumbers + in_square(d % kSquare, slot);
}

template <int kTerms>
using SquareTerms =
    uint32_t[kTerms][4];  // a lane's part of a square, as sums of bf16: [term][2 n / 8 + k / 8]

template <int kTerms>
__device__ void split_square(float (&x)[kLaneNumbers], SquareTerms<kTerms>& terms) {
  for (int term = 0; term < kTerms; ++term)
    for (int word = 0; word < 4; ++word) terms[term][word] = split_pair(x[2 * word], x[2 * word + 1]);
}

// Of each format: how many bf16 numbers one of its own is the sum of, and what a lane has of a square, which
// starts at `at`.
struct KvF32 {
  using Stored = float;
  static constexpr bool kScaled = false;
  static constexpr int kTerms = 3;
  __device__ static float store(float x) { return x; }
  __device__ static float load(float x) { return x; }
  __device__ static void load(View<const float> cache, size_t at, SquareTerms<kTerms>& terms) {
    const auto a = cache.load<float4>(at), b = cache.load<float4>(at + 4);
    float x[kLaneNumbers] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    split_square<kTerms>(x, terms);
  }
};
struct KvF16 {
  using Stored = uint16_t;
  static constexpr bool kScaled = false;
  static constexpr int kTerms = 2;
  __device__ static uint16_t store(float x) { return float_to_half_bits(x); }
  __device__ static float load(uint16_t x) { return half_bits_to_float(x); }
  __device__ static void load(View<const uint16_t> cache, size_t at, SquareTerms<kTerms>& terms) {
    const auto v = cache.load<uint4>(at);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    float x[kLaneNumbers];
    for (int i = 0; i < kLaneNumbers; ++i) x[i] = load(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
    split_square<kTerms>(x, terms);
  }
};
struct KvBf16 {
  using Stored = uint16_t;
  static constexpr bool kScaled = false;
  static constexpr int kTerms = 1;
  __device__ static uint16_t store(float x) { return float_to_bf16_bits(x); }
  __device__ static float load(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
  __device__ static void load(View<const uint16_t> cache, size_t at, SquareTerms<kTerms>& terms) {
    const auto v = cache.load<uint4>(at);
    terms[0][0] = v.x, terms[0][1] = v.y, terms[0][2] = v.z, terms[0][3] = v.w;
  }
};
// Bytes, with a scale for each key and each value. A few numbers of a key are far larger than the others and
// would cost those their bits, so keys and queries are first rotated by a Hadamard matrix, which spreads them
// out and leaves every dot product what it was, times the matrix's size (as in QuaRot, arXiv 2404.00456).
struct KvInt8 {
  using Stored = int8_t;
  static constexpr bool kScaled = true;
  static constexpr int kTerms = 1;
  __device__ static int8_t store(float x) { return static_cast<int8_t>(rintf(x)); }
  __device__ static void load(View<const int8_t> cache, size_t at, SquareTerms<kTerms>& terms) {
    const auto v = cache.load<uint2>(at);
    const uint32_t words[2] = {v.x, v.y};
    float x[kLaneNumbers];
    for (int i = 0; i < kLaneNumbers; ++i)
      x[i] = static_cast<float>(static_cast<int8_t>(words[i / 4] >> (8 * (i % 4)) & 255));
    split_square<kTerms>(x, terms);
  }
};

template <class Visit>
void visit_kv_format(Format format, Visit visit) {
  if (format == Format::F32) return visit(KvF32{});
  if (format == Format::F16) return visit(KvF16{});
  if (format == Format::BF16) return visit(KvBf16{});
  check(format == Format::INT8, "a key/value cache is F32, F16, BF16 or INT8");
  visit(KvInt8{});
}

// Where the scales of a head's keys (kBlockSize) and values (kBlockSize) are, in bytes from its first.
__host__ __device__ inline int scale_byte(int head_dim, bool value, int slot) {
  return 2 * squares(head_dim) * kSquareNumbers + 4 * ((value ? kBlockSize : 0) + slot);
}

// A head as a warp holds it: a lane has the pairs of numbers from 2 lane + 64 j on.
template <int kDim>
using LanePairs = float[(kDim + 63) / 64][2];

// Zeros behind its end.
template <size_t kPairs>
__device__ void load_head(View<const float> head, int head_dim, int lane, float (&x)[kPairs][2]) {
  for (int j = 0; j < static_cast<int>(kPairs); ++j)
    for (int i = 0; i < 2; ++i) {
      const int d = 2 * lane + 64 * j + i;
      x[j][i] = d < head_dim ? head[static_cast<size_t>(d)] : 0;
    }
}

// Numbers of a head that are rotated together: the largest power of two that divides its size. Heads that are
// no multiple of 16 stay as they are.
__host__ __device__ inline int rotated_together(int head_dim) {
  return head_dim % 16 == 0 ? head_dim & -head_dim : 1;
}

// The fast Walsh-Hadamard transform.
template <size_t kPairs>
__device__ void rotate_head(float (&x)[kPairs][2], int head_dim, int lane) {
  constexpr int pairs = static_cast<int>(kPairs);
  const int together = rotated_together(head_dim);
  if (together == 1) return;
  for (int j = 0; j < pairs; ++j) {
    const float a = x[j][0], b = x[j][1];
    x[j][0] = a + b;
    x[j][1] = a - b;
  }
  for (int h = 1; h < min(together / 2, kWarpSize); h *= 2)  // numbers 2h apart
    for (int j = 0; j < pairs; ++j)
      for (int i = 0; i < 2; ++i) {
        const float other = __shfl_xor_sync(~0u, x[j][i], h);
        x[j][i] = lane & h ? other - x[j][i] : x[j][i] + other;
      }
  for (int h = 1; h < pairs; h *= 2)  // numbers 64h apart
    for (int j = 0; j < pairs; ++j)
      for (int i = 0; i < 2; ++i) {
        if (j & h || 64 * h >= together) continue;
        const float a = x[j][i], b = x[j + h][i];
        x[j][i] = a + b;
        x[j + h][i] = a - b;
      }
}

}  // namespace engine::cuda
