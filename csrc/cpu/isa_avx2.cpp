#include "cpu/vec_avx2.h"

#include "cpu/attention.inl"
#include "cpu/linear.inl"
#include "cpu/peak.inl"
#include "cpu/pointwise.inl"

namespace engine {

const Kernels kAvx2Kernels = {"avx2", &kLinear, &kAttention, &kPointwise, &kPeak};

}  // namespace engine
