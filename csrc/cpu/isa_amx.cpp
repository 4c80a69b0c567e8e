#include "cpu/dot_avx512vnni.h"

#include "cpu/attention.inl"
#include "cpu/linear.inl"
#include "cpu/linear_amx.inl"
#include "cpu/linear_amx_bf16.inl"
#include "cpu/peak.inl"
#include "cpu/peak_amx.inl"
#include "cpu/pointwise.inl"

namespace engine {

const Kernels kAmxKernels = {"amx", &kLinearAmx, &kAttention, &kPointwise, &kPeakAmx};

}  // namespace engine
