#include "cuda/make_cuda_device.h"

#include <cuda_runtime.h>

#include "cuda/cuda_device.h"
#include "cuda/pointwise.h"

namespace engine {
namespace {

constexpr int kOldestMajor = 8;  // compute capability: tensor cores that take bf16

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string does_not_start(cudaError_t error) {
  return std::string("CUDA does not start: ") + cudaGetErrorString(error) +
         ": look at nvidia-smi, or take --device cpu";
}

std::string driver_problem() {
  int driver = 0, runtime = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "there is no NVIDIA driver here: install one, or take --device cpu";
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver knows CUDA " + version_text(driver) + ", the engine was built with CUDA " +
           version_text(runtime) + ": update the driver, or take --device cpu";
  if (error != cudaSuccess && error != cudaErrorNoDevice) return does_not_start(error);
  if (count == 0)
    return "no GPU is visible here: look at nvidia-smi and CUDA_VISIBLE_DEVICES, or take --device cpu";
  return "";
}

std::string device_problem() {
  cudaDeviceProp properties;
  const cudaError_t asked = cudaGetDeviceProperties(&properties, 0);
  if (asked != cudaSuccess) return does_not_start(asked);
  const std::string version = std::to_string(properties.major) + "." + std::to_string(properties.minor);
  const std::string gpu = std::string(properties.name) + " has compute capability " + version;
  if (properties.major < kOldestMajor)
    return gpu + ", the engine's kernels need 8.0 (Ampere) or later: take --device cpu";
  const cudaError_t found = cuda::find_kernels();
  if (found == cudaErrorNoKernelImageForDevice || found == cudaErrorInvalidDeviceFunction)
    return gpu + ", for which the engine was not built: install it with --config-settings=cmake.define." +
           "CMAKE_CUDA_ARCHITECTURES=" + std::to_string(properties.major) + std::to_string(properties.minor) +
           ", or take --device cpu";
  return found == cudaSuccess ? "" : does_not_start(found);
}

}  // namespace

std::string cuda_problem() {
  std::string problem = driver_problem();
  if (problem.empty()) problem = device_problem();
  cudaGetLastError();  // it is told here
  return problem;
}

std::unique_ptr<Device> make_cuda_device(const DeviceOptions& options) {
  return std::make_unique<cuda::CudaDevice>(options);
}

}  // namespace engine
