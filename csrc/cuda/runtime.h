// CUDA's runtime as C++: errors that say what was tried, memory that frees itself.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

namespace engine::cuda {

// Throws std::runtime_error "CUDA: <doing>: <error>; <remedy>".
void cuda_check(cudaError_t error, const char* doing);

// Bytes of the device's memory.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(size_t bytes);
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceMemory();

  // At least `bytes`; what it held is lost when it grows.
  void reserve(size_t bytes);
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

void copy_to_device(void* device, const void* host, size_t bytes, cudaStream_t stream);

}  // namespace engine::cuda
