#include "cpu/vec_scalar.h"

#include "cpu/attention.inl"
#include "cpu/linear.inl"
#include "cpu/peak.inl"
#include "cpu/pointwise.inl"

namespace engine {

const Kernels kScalarKernels = {"scalar", &kLinear, &kAttention, &kPointwise, &kPeak};

}  // namespace engine
