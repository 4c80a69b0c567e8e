#include "cpu/dot_avx512vnni.h"

#include "cpu/attention.inl"
#include "cpu/linear.inl"
#include "cpu/peak.inl"
#include "cpu/pointwise.inl"

namespace engine {

const Kernels kAvx512VnniKernels = {"avx512vnni", &kLinear, &kAttention, &kPointwise, &kPeak};

}  // namespace engine
