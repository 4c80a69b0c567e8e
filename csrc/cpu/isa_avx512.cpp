#include "cpu/dot_avx512.h"

#include "cpu/attention.inl"
#include "cpu/linear.inl"
#include "cpu/peak.inl"
#include "cpu/pointwise.inl"

namespace engine {

const Kernels kAvx512Kernels = {"avx512", &kLinear, &kAttention, &kPointwise, &kPeak};

}  // namespace engine
