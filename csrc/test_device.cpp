#include "test_device.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "cpu/cpu_device.h"
#include "cuda/attention.h"
#include "cuda/make_cuda_device.h"

void schedule_cuda_like(int num_threads);

namespace engine {

const Kernels& kernels_named(const std::string& isa) {
  for (const Kernels* kernels : supported_kernels())
    if (isa == kernels->name) return *kernels;
  throw InputError("cannot run here: " + isa);
}

std::unique_ptr<Device> make_test_device(const std::string& name, int num_threads, Arithmetic arithmetic) {
  if (name == "cuda") {
    schedule_cuda_like(num_threads);
    auto device = make_cuda_device({.arithmetic = arithmetic});
    device->reserve(std::min(device->memory_available(), kTestMemory));
    return device;
  }
  return std::make_unique<CpuDevice>(kernels_named(name), num_threads, arithmetic);
}

void fill_block(KvCache& cache, int32_t block, uint8_t value) {
  if (auto* cpu = dynamic_cast<CpuKvCache*>(&cache)) {
    std::memset(cpu->head(0, block, 0), value, cpu->block_stride());
    return;
  }
  const auto& gpu = dynamic_cast<cuda::CudaKvCache&>(cache);
  const size_t bytes = gpu.memory.bytes() / static_cast<size_t>(gpu.num_blocks);
  cuda::cuda_check(
      cudaMemsetAsync(gpu.memory.as<std::byte>() + static_cast<size_t>(block) * bytes, value, bytes, nullptr),
      "cudaMemset");
  cuda::cuda_check(cudaStreamSynchronize(nullptr), "cudaMemset");
}

size_t cache_bytes(const KvCache& cache) {
  if (const auto* cpu = dynamic_cast<const CpuKvCache*>(&cache)) return cpu->bytes();
  return dynamic_cast<const cuda::CudaKvCache&>(cache).memory.bytes();
}

}  // namespace engine
