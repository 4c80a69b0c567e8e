#include "cuda/runtime.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/check.h"

namespace engine::cuda {

void cuda_check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) [[likely]]
    return;
  // Of these a process does not recover: its memory on the GPU is gone.
  throw std::runtime_error(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(error) +
                           "; start the server again, and if that fails look at nvidia-smi and the system's "
                           "log, or take --device cpu");
}

DeviceMemory::DeviceMemory(size_t bytes) : bytes_(bytes) {
  const cudaError_t error = cudaMalloc(&data_, std::max<size_t>(bytes, 1));
  if (error == cudaErrorMemoryAllocation) cudaGetLastError();  // it is answered here
  require(error != cudaErrorMemoryAllocation,
          "out of GPU memory: a buffer takes " + std::to_string((bytes >> 20) + 1) +
              " MiB; lower --memory or --max-num-batched-tokens, or end what else uses the GPU");
  cuda_check(error, "cudaMalloc");
}

DeviceMemory::~DeviceMemory() {
  cudaFree(data_);  // a lost device has freed it already
}

void DeviceMemory::reserve(size_t bytes) {
  if (bytes <= bytes_) return;
  *this = DeviceMemory();
  *this = DeviceMemory(bytes);
}

void copy_to_device(void* device, const void* host, size_t bytes, cudaStream_t stream) {
  if (bytes > 0)
    cuda_check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream), "a copy to the GPU");
}

}  // namespace engine::cuda
