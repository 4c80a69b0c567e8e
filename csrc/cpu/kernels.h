// The table of inner loops, one per ISA, chosen once at start. Kernels take raw pointers and do one thread's
// share; shapes are checked and work is divided one ring out (linear.cpp, attention.cpp, cpu_device.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/quant.h"
#include "model/config.h"

namespace engine {

inline constexpr int kLanes =
    16;  // output channels in a weight panel, keys in a cache block, lanes of F32x16

struct LinearKernels;     // linear.h
struct AttentionKernels;  // attention.h
struct PointwiseKernels;  // pointwise.h
struct PeakKernels;       // peak.h

struct Kernels {
  const char* name;  // "scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"
  const LinearKernels* linear;
  const AttentionKernels* attention;
  const PointwiseKernels* pointwise;
  const PeakKernels* peak;
};

// Best first; only those that this CPU and operating system can run.
std::vector<const Kernels*> supported_kernels();
// The best one, or the one that the environment variable LANGCHAIN_VLLM_ISA names (an error when it cannot
// run here).
const Kernels& select_kernels();

// Exported by isa_*.cpp.
extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;

}  // namespace engine
