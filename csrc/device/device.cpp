#include "device/device.h"

#include "base/check.h"
#include "cpu/cpu_device.h"
#include "cuda/make_cuda_device.h"

namespace engine {

void Device::add_norm(Norm kind, float eps, const float* weight, const float* bias, float* x,
                      const float* delta, float* out, int n, int size) {
  add(x, delta, n, size);
  norm(kind, eps, weight, bias, x, out, n, size);
}

std::unique_ptr<Device> make_device(const DeviceOptions& options) {
  const std::string& kind = options.kind;
  if (kind == "cuda" || (kind == "auto" && cuda_problem().empty())) return make_cuda_device(options);
  require(kind == "cpu" || kind == "auto",
          "there is no device \"" + kind + "\"; what can be asked for is \"auto\", \"cpu\" or \"cuda\"");
  return std::make_unique<CpuDevice>(select_kernels(), options.num_threads, options.arithmetic);
}

}  // namespace engine
