// What the tests' bindings share: devices by name, and numpy arrays in a device's memory.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string>

#include "cpu/kernels.h"
#include "device/device.h"

namespace engine {

inline constexpr size_t kTestMemory = size_t{128} << 20;  // that a GPU gives to a test

// name: an instruction set, or "cuda". Emulated, CUDA takes threads in another order for num_threads > 1.
std::unique_ptr<Device> make_test_device(const std::string& name, int num_threads, Arithmetic arithmetic);
const Kernels& kernels_named(const std::string& isa);

// The first `numbers` f32 of an array in the device's memory, and what an op made of them back in the array.
class OnDevice {
 public:
  OnDevice(Device& device, float* host, size_t numbers)
      : device_(device), host_(host), buffer_(device.upload({host, numbers})) {}
  template <class Array>
  OnDevice(Device& device, Array& array) : OnDevice(device, array.data(), array.size()) {}
  float* data() { return buffer_->data; }
  void fetch() { device_.copy_to_host(host_, buffer_->data, buffer_->size); }

 private:
  Device& device_;
  float* host_;
  std::unique_ptr<Buffer> buffer_;
};

// Every byte of a block of the cache, in all layers.
void fill_block(KvCache& cache, int32_t block, uint8_t value);
size_t cache_bytes(const KvCache& cache);

}  // namespace engine
