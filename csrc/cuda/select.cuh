// Finding what has a rank among the tokens of a row, by one block of threads and without sorting: ranks are
// counted in masses, integers whose sum has no order.
#pragma once

#include "cuda/common.cuh"

namespace engine::cuda {

inline constexpr int kWarps = 16;  // of the block
inline constexpr int kThreads = kWarps * kWarpSize;
inline constexpr int kDigitBits = 11;  // of a key, that a pass over the row decides
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr float kLowest = -__builtin_inff();
inline constexpr float kHighest = 3.402823466e38f;

// Integers in the order of the numbers that they stand for, equal where those are.
__device__ inline uint32_t order_of(float x) {
  const uint32_t bits = x == 0 ? 0 : float_to_bits(x);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

// Tokens in their order: the greater key first, then the lower token.
struct Ranked {
  uint32_t key;
  int32_t token;
  __device__ uint64_t bits() const { return uint64_t{key} << 32 | ~static_cast<uint32_t>(token); }
  __device__ static Ranked from(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 32), static_cast<int32_t>(~static_cast<uint32_t>(bits))};
  }
};

// The first tokens of that order.
struct Cut {
  uint32_t key = 0;
  int32_t last = 0x7fffffff;  // of the tokens with that key
  int64_t mass = 0;           // of all of them
  __device__ bool keeps(uint32_t k, int32_t token) const { return k > key || (k == key && token <= last); }
};

struct Item {
  uint32_t key;
  int64_t mass;
};

struct SelectRoom {
  Shared<uint32_t, kBins> low, high;  // halves of a mass: shared memory adds 32 bits at once, not 64
  Shared<int64_t, kWarps> sums;
  Shared<uint64_t, kWarps> partial;
  Shared<double, kWarps> doubles;
  Shared<uint32_t, 1> count;

  __device__ void add(int bin, int64_t mass) {
    const auto lower = static_cast<uint32_t>(mass);
    const auto carry = static_cast<uint32_t>(low.add(bin, lower) > ~lower);
    const auto upper = static_cast<uint32_t>(mass >> 32) + carry;
    if (upper > 0) high.add(bin, upper);
  }
  __device__ int64_t mass(int bin) {
    const uint64_t upper = high[bin];
    return static_cast<int64_t>(upper << 32 | static_cast<uint32_t>(low[bin]));
  }
};

struct Greater {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

template <class T, class Combine>
__device__ T warp_combine(T x, Combine combine) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    x = combine(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

// Over the block, in one order. Every thread gets the result.
template <class T, class Combine>
__device__ T block_combine(T x, Shared<T, kWarps>& partial, Combine combine) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  x = warp_combine(x, combine);
  __syncthreads();  // what the room held has been read
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  T all = partial[0];
  for (int w = 1; w < kWarps; ++w) all = combine(all, static_cast<T>(partial[w]));
  return all;
}

struct Place {
  int index;
  int64_t missing;  // what those before it leave of the mass
};

// The first of `count` places at which the masses so far reach `missing`, which is at most their sum. Each
// warp adds up a part, and the part where it happens is divided among the warps again.
template <class Mass>
__device__ Place locate(int count, int64_t missing, SelectRoom& room, Mass mass) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int begin = 0, end = count;
  while (end - begin > 1) {
    const int part = (end - begin + kWarps - 1) / kWarps, last = min(begin + (warp + 1) * part, end);
    int64_t sum = 0;
    for (int i = begin + warp * part + lane; i < last; i += kWarpSize) sum += mass(i);
    sum = warp_combine(sum, Plus());
    __syncthreads();
    if (lane == 0) room.sums[warp] = sum;
    __syncthreads();
    int w = 0;
    for (; w < kWarps - 1 && room.sums[w] < missing; ++w) missing -= room.sums[w];
    begin += w * part;
    end = min(begin + part, end);
  }
  return {begin, missing};
}

// The shortest cut whose mass is at least `wanted`, which is at most the mass of all. item(i) gives the key
// and mass of token i. A digit of the key in each pass, from the top: the masses of its values are added up.
template <class Items>
__device__ Cut select(int count, int64_t wanted, SelectRoom& room, Items item) {
  uint32_t key = 0;
  int64_t missing = wanted;
  for (int upper = 32, shift; upper > 0; upper = shift) {
    shift = max(upper - kDigitBits, 0);
    const int bins = 1 << (upper - shift);
    __syncthreads();
    for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += kThreads) {
      room.low[bin] = 0;
      room.high[bin] = 0;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const Item it = item(i);
      if (it.mass > 0 && uint64_t{it.key} >> upper == key)
        room.add(bins - 1 - static_cast<int>(it.key >> shift & static_cast<uint32_t>(bins - 1)), it.mass);
    }
    __syncthreads();
    const Place found = locate(bins, missing, room, [&](int bin) { return room.mass(bin); });
    key = key << (upper - shift) | static_cast<uint32_t>(bins - 1 - found.index);
    missing = found.missing;
  }
  const auto of_key = [&](int i) {
    const Item it = item(i);
    return it.key == key ? it.mass : 0;
  };
  const Place last = locate(count, missing, room, of_key);
  return {key, last.index, wanted - last.missing + item(last.index).mass};
}

}  // namespace engine::cuda
