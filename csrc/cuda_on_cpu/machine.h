// The machine that the emulated runtime pretends to be, for tests of what happens on others.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

struct Machine {
  int driver_version = 13000;  // as cudaDriverGetVersion() gives it; 0: no driver
  int num_devices = 1;
  int major = 9, minor = 0;  // compute capability
  size_t total_bytes = size_t{1} << 30;
  size_t used_bytes = 0;
  std::atomic<int64_t> graphs_recorded = 0;
  bool has_code = true;                       // the kernels were compiled for it
  std::atomic<bool> lost = false;             // every call from now on fails
  std::atomic<int64_t> calls_until_lost = 0;  // 0: it stays
};

inline Machine machine;

}  // namespace cuda_on_cpu
