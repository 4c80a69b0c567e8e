// Bytes of several arrays, each at a multiple of 16, to be copied to the device at once.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "cuda/runtime.h"

namespace engine::cuda {

// Padded: each array has room for a power of two.
class Parcel {
 public:
  explicit Parcel(bool padded = false) : padded_(padded) {}
  // Returns where the array starts; `filler` fills up its room.
  template <class T>
  size_t add(const std::vector<T>& values, const T& filler = {}) {
    const size_t start = (bytes_.size() + kAlignment - 1) / kAlignment * kAlignment;
    const size_t room = padded_ && !values.empty() ? std::bit_ceil(values.size()) : values.size();
    std::vector<T> filled = values;
    filled.resize(room, filler);
    bytes_.resize(start + std::max<size_t>(1, room * sizeof(T)));
    if (room > 0) std::memcpy(bytes_.data() + start, filled.data(), room * sizeof(T));
    rooms_.push_back(static_cast<int64_t>(room));
    return start;
  }
  int last_room() const { return static_cast<int>(rooms_.back()); }
  const std::vector<int64_t>& rooms() const { return rooms_; }
  void send(DeviceMemory& memory, cudaStream_t stream) const {
    memory.reserve(bytes_.size());
    copy_to_device(memory.as<std::byte>(), bytes_.data(), bytes_.size(), stream);
  }

  static constexpr size_t kAlignment = 16;

 private:
  bool padded_;
  std::vector<std::byte> bytes_;
  std::vector<int64_t> rooms_;
};

template <class T>
T* at(const DeviceMemory& memory, size_t offset) {
  return reinterpret_cast<T*>(memory.as<std::byte>() + offset);
}

}  // namespace engine::cuda
