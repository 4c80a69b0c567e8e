// CUDA's runtime as C++: errors that say what was tried, memory that frees itself.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "cuda/arena.h"

namespace engine::cuda {

// Throws std::runtime_error "CUDA: <doing>: <error>; <remedy>".
void cuda_check(cudaError_t error, const char* doing);

// Bytes of an arena, which outlives them.
class DeviceMemory {
 public:
  explicit DeviceMemory(Arena& arena) : arena_(&arena) {}
  DeviceMemory(Arena& arena, size_t bytes) : arena_(&arena), data_(arena.take(bytes)), bytes_(bytes) {}
  DeviceMemory(DeviceMemory&& other) noexcept : arena_(other.arena_) { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(arena_, other.arena_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceMemory() { arena_->give_back(data_); }

  // At least `bytes`; what it held is lost when it grows.
  void reserve(size_t bytes);
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  Arena* arena_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

void copy_to_device(void* device, const void* host, size_t bytes, cudaStream_t stream);

}  // namespace engine::cuda
