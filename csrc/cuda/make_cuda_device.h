// The one thing that the rest of the engine knows of CUDA. Built without it, no_cuda.cpp stands in.
#pragma once

#include <memory>
#include <string>

#include "device/device.h"

namespace engine {

// Why no GPU can be used here, with the remedy; empty if one can.
std::string cuda_problem();

// The first GPU. Throws InputError with cuda_problem().
std::unique_ptr<Device> make_cuda_device(const DeviceOptions& options);

}  // namespace engine
