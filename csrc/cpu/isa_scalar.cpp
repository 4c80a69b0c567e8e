#include "cpu/vec_scalar.h"

#include "cpu/attention.inl"
#include "cpu/linear.inl"
#include "cpu/pointwise.inl"

namespace engine {

const Kernels kScalarKernels = {"scalar", &kLinear, &kAttention, &kPointwise};

}  // namespace engine
