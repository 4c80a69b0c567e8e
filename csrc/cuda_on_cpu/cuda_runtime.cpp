#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

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

struct CudaOnCpuStream {};
struct CudaOnCpuGraph {
  std::vector<std::function<void()>> nodes;
};
struct CudaOnCpuGraphExec : CudaOnCpuGraph {};

namespace {

thread_local cudaStream_t capturing = nullptr;
thread_local cudaGraph_t recorded = nullptr;  // null: the capture is invalid

cudaError_t invalidate(cudaError_t why) {
  delete std::exchange(recorded, nullptr);
  return why;
}

// Of calls that a capture does not bear.
cudaError_t health_outside_captures() {
  return capturing == nullptr ? health() : invalidate(cudaErrorStreamCaptureUnsupported);
}

}  // namespace

cudaError_t cuda_on_cpu::enqueue(cudaStream_t stream, std::function<void()> work) {
  if (const cudaError_t error = health(); error != cudaSuccess) return error;
  if (capturing != nullptr && stream == nullptr) return invalidate(cudaErrorStreamCaptureImplicit);
  if (capturing == nullptr || stream != capturing) {
    work();
    return cudaSuccess;
  }
  if (recorded == nullptr) return cudaErrorStreamCaptureInvalidated;
  recorded->nodes.push_back(std::move(work));
  return cudaSuccess;
}

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
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
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
  if (const cudaError_t error = health_outside_captures(); error != cudaSuccess) return error;
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
  return health_outside_captures();
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return cuda_on_cpu::enqueue(stream, [=] {
    if (bytes > 0) std::memcpy(to, from, bytes);
  });
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  return cuda_on_cpu::enqueue(stream, [=] { std::memset(memory, value, bytes); });
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CudaOnCpuStream;
  return health();
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return health_outside_captures();
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || capturing != nullptr) return cudaErrorStreamCaptureUnsupported;
  capturing = stream;
  recorded = new CudaOnCpuGraph;
  return health();
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  capturing = nullptr;
  *graph = std::exchange(recorded, nullptr);
  return *graph == nullptr ? cudaErrorStreamCaptureInvalidated : health();
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CudaOnCpuGraphExec{*graph};
  ++cuda_on_cpu::machine.graphs_recorded;
  return health();
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return cuda_on_cpu::enqueue(stream, [executable] {
    for (const auto& node : executable->nodes) node();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
