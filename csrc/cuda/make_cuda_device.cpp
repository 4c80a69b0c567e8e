#include "cuda/make_cuda_device.h"

#include <cuda_runtime.h>

#include "cuda/cuda_device.h"

namespace engine {
namespace {

constexpr int kOldestMajor = 8;  // compute capability: tensor cores that take bf16

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string cuda_problem() {
  int driver = 0, runtime = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "there is no NVIDIA driver here: install one, or take --device cpu";
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver knows CUDA " + version_text(driver) + ", the engine was built with CUDA " +
           version_text(runtime) + ": update the driver, or take --device cpu";
  if (count == 0)
    return "no GPU is visible here: look at nvidia-smi and CUDA_VISIBLE_DEVICES, or take --device cpu";
  if (error != cudaSuccess) return std::string("CUDA does not start: ") + cudaGetErrorString(error);
  cudaDeviceProp properties;
  const cudaError_t asked = cudaGetDeviceProperties(&properties, 0);
  if (asked != cudaSuccess) return std::string("CUDA does not start: ") + cudaGetErrorString(asked);
  if (properties.major < kOldestMajor)
    return std::string(properties.name) + " has compute capability " + std::to_string(properties.major) +
           "." + std::to_string(properties.minor) +
           ", the engine's kernels need 8.0 (Ampere) or later: take --device cpu";
  return "";
}

std::unique_ptr<Device> make_cuda_device(int num_threads, Arithmetic arithmetic) {
  return std::make_unique<cuda::CudaDevice>(num_threads, arithmetic);
}

}  // namespace engine
