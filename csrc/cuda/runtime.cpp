#include "cuda/runtime.h"

#include <stdexcept>
#include <string>

namespace engine::cuda {

void cuda_check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) [[likely]]
    return;
  // Of these a process does not recover: its memory on the GPU is gone.
  throw std::runtime_error(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(error) +
                           "; start the server again, and if that fails look at nvidia-smi and the system's "
                           "log, or take --device cpu");
}

void DeviceMemory::reserve(size_t bytes) {
  if (bytes <= bytes_) return;
  *this = DeviceMemory(*arena_);
  *this = DeviceMemory(*arena_, bytes);
}

void copy_to_device(void* device, const void* host, size_t bytes, cudaStream_t stream) {
  if (bytes > 0)
    cuda_check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream), "a copy to the GPU");
}

}  // namespace engine::cuda
