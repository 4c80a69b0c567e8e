// What all kernels share: launches, sums over a warp or block, and functions that both devices compute alike.
#pragma once

#include <cuda_runtime.h>

#include "cuda/runtime.h"
#include "intrinsics.cuh"

namespace engine::cuda {

inline constexpr int kWarpSize = 32;

template <class... Parameters, class... Arguments>
void launch(cudaStream_t stream, dim3 grid, int threads, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cuda_check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "a kernel");
}

inline unsigned blocks_for(size_t items, int per_block) {
  return static_cast<unsigned>((items + static_cast<size_t>(per_block) - 1) / static_cast<size_t>(per_block));
}

__device__ inline float warp_sum(float x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// NaNs are not counted.
__device__ inline float warp_max(float x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

// The sum over a block of kWarps warps, in one order. `partial` may be used again after another barrier.
template <int kWarps>
__device__ float block_sum(float x, Shared<float, kWarps>& partial) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  float sum = partial[0];
  for (int w = 1; w < kWarps; ++w) sum += partial[w];
  return sum;
}

// Two f32 as bf16, and what that leaves of them.
__device__ inline uint32_t split_pair(float& low, float& high) {
  const uint32_t both = pack_bf16(low, high);
  low -= bits_to_float(both << 16);
  high -= bits_to_float(both & 0xffff0000);
  return both;
}

// e^x as cpu/vec_math.inl has it: 1 ulp; 0 below -86.5, e^88.37 above 88.37; NaN stays NaN.
__device__ inline float exp_f32(float x) {
  constexpr float lowest = -86.5f, highest = 88.37f;
  const float in = x < lowest ? lowest : (x > highest ? highest : x);
  const float n = rintf(in * 1.44269504f);
  float r = fmaf(n, -0.693359375f, in);
  r = fmaf(n, 2.12194440e-4f, r);
  float q = 0.0013814599f;
  q = fmaf(q, r, 0.008368717f);
  q = fmaf(q, r, 0.04166839f);
  q = fmaf(q, r, 0.16666521f);
  q = fmaf(q, r, 0.49999994f);
  const float power = fmaf(q * r, r, r) + 1;
  const float scale = bits_to_float(static_cast<uint32_t>((n == n ? static_cast<int>(n) : 0) + 127) << 23);
  return x < lowest ? 0 : power * scale;
}

}  // namespace engine::cuda
