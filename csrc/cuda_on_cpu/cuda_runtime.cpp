#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <unordered_map>

#include "cuda_on_cpu/machine.h"

namespace {

using cuda_on_cpu::machine;

constexpr size_t kAlignment = 256;  // of cudaMalloc()
constexpr int kRuntimeVersion = 13000;

std::unordered_map<void*, size_t> allocated;  // and its bytes

cudaError_t health() {
  if (machine.calls_until_lost > 0 && --machine.calls_until_lost == 0) machine.lost = true;
  return machine.lost ? cudaErrorIllegalAddress : cudaSuccess;
}

}  // namespace

cudaError_t cuda_on_cpu::launch_problem() {
  return machine.has_code ? health() : cudaErrorNoKernelImageForDevice;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  return health();
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = machine.driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kRuntimeVersion;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  if (machine.driver_version < kRuntimeVersion) return cudaErrorInsufficientDriver;
  *count = machine.num_devices;
  return machine.num_devices > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaSetDevice(int) {
  return health();
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"CUDA on CPU", machine.total_bytes, machine.major, machine.minor, 4};
  return health();
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = machine.total_bytes;
  *free = machine.total_bytes - std::min(machine.used_bytes, machine.total_bytes);
  return health();
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (health() != cudaSuccess) return health();
  if (machine.used_bytes + bytes > machine.total_bytes) return cudaErrorMemoryAllocation;
  const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  *memory = std::aligned_alloc(kAlignment, rounded);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  machine.used_bytes += bytes;
  allocated[*memory] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  const auto found = allocated.find(memory);
  if (found == allocated.end()) throw cuda_on_cpu::Fault("cudaFree() of what cudaMalloc() did not give");
  machine.used_bytes -= found->second;
  allocated.erase(found);
  std::free(memory);
  return health();
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (health() == cudaSuccess && bytes > 0) std::memcpy(to, from, bytes);
  return health();
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  if (health() == cudaSuccess) std::memset(memory, value, bytes);
  return health();
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return health();
}
cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return health();
}
