// Bytes of several arrays, each at a multiple of 16, to be copied to the device at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

#include "cuda/runtime.h"

namespace engine::cuda {

class Parcel {
 public:
  // Gives the offset of the array.
  template <class T>
  size_t add(std::span<const T> values) {
    const size_t start = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(start + std::max<size_t>(1, values.size_bytes()));
    if (!values.empty()) std::memcpy(bytes_.data() + start, values.data(), values.size_bytes());
    return start;
  }
  void send(DeviceMemory& memory, cudaStream_t stream) const {
    memory.reserve(bytes_.size());
    copy_to_device(memory.as<std::byte>(), bytes_.data(), bytes_.size(), stream);
  }

 private:
  std::vector<std::byte> bytes_;
};

template <class T>
T* at(const DeviceMemory& memory, size_t offset) {
  return reinterpret_cast<T*>(memory.as<std::byte>() + offset);
}

}  // namespace engine::cuda
