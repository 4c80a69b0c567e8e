// Compiled in place of the CUDA device where there is no CUDA compiler.
#include "base/check.h"
#include "cuda/make_cuda_device.h"

namespace engine {

std::string cuda_problem() {
  return "the engine was built without CUDA: install it with nvcc at hand and "
         "--config-settings=cmake.define.ENGINE_CUDA=ON, or take --device cpu";
}

std::unique_ptr<Device> make_cuda_device(const DeviceOptions&) {
  require(false, cuda_problem());
  return nullptr;
}

}  // namespace engine
