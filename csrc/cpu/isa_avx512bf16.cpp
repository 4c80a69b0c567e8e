#include "cpu/dot_avx512vnni.h"

#include "cpu/attention.inl"
#include "cpu/linear.inl"
#include "cpu/linear_avx512bf16.inl"
#include "cpu/peak.inl"
#include "cpu/pointwise.inl"

namespace engine {

const Kernels kAvx512Bf16Kernels = {"avx512bf16", &kLinearBf16, &kAttention, &kPointwise, &kPeak};

}  // namespace engine
