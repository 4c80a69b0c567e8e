// What the engine uses of CUDA's runtime, for a C++ compiler without it: found in place of NVIDIA's header by
// the include path alone. Names and meanings are those of the CUDA Runtime API and the CUDA C++ Programming
// Guide; memory of the "device" is the host's, and every call has finished when it returns. While a stream is
// captured, its launches and copies are recorded and not run: with their arguments as they were, and what
// pointers point to as it is when the graph runs.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#include "cuda_on_cpu/grid.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a < b ? b : a;
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads() {
  cuda_on_cpu::block_barrier();
}
inline void __syncwarp(unsigned mask = ~0u) {
  cuda_on_cpu::warp_barrier(mask);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= cuda_on_cpu::kMaxValue);
  const auto* seen = cuda_on_cpu::exchange("__shfl_sync", mask, &value, sizeof value);
  std::memcpy(&value, seen + lane % cuda_on_cpu::kWarp * cuda_on_cpu::kMaxValue, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  const auto* seen = cuda_on_cpu::exchange("__shfl_xor_sync", mask, &value, sizeof value);
  const int lane = (cuda_on_cpu::here().thread % cuda_on_cpu::kWarp) ^ lane_mask;
  std::memcpy(&value, seen + lane * cuda_on_cpu::kMaxValue, sizeof value);
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto* seen = cuda_on_cpu::exchange("__ballot_sync", mask, &predicate, sizeof predicate);
  unsigned votes = 0;
  for (int i = 0; i < cuda_on_cpu::kWarp; ++i) {
    std::memcpy(&predicate, seen + i * cuda_on_cpu::kMaxValue, sizeof predicate);
    votes |= static_cast<unsigned>(predicate != 0) << i;
  }
  return votes;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureImplicit = 906,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };
using cudaStream_t = struct CudaOnCpuStream*;
using cudaGraph_t = struct CudaOnCpuGraph*;
using cudaGraphExec_t = struct CudaOnCpuGraphExec*;

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  int major, minor, multiProcessorCount;
};

struct cudaFuncAttributes {};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t);
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);

namespace cuda_on_cpu {
cudaError_t launch_problem();  // why no kernel can run
// Runs or records it.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);
}  // namespace cuda_on_cpu

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cuda_on_cpu::launch_problem();
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (const cudaError_t problem = cuda_on_cpu::launch_problem(); problem != cudaSuccess) return problem;
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  return cuda_on_cpu::enqueue(config->stream,
                              [kernel, values, grid = config->gridDim, block = config->blockDim] {
                                cuda_on_cpu::run(grid, block, [&] { std::apply(kernel, values); });
                              });
}
