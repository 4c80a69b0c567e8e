// Ops on rows of numbers, as device/device.h describes them. Pointers are the device's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "model/config.h"

namespace engine::cuda {

// Whether there is code for the current GPU; all kernels are compiled for the same ones.
cudaError_t find_kernels();

// `delta` (n, size) or null: added to x before.
void norm_rows(cudaStream_t stream, Norm kind, float eps, const float* weight, const float* bias, float* x,
               const float* delta, float* out, int n, int size);
void activate_rows(cudaStream_t stream, Activation kind, bool gated, const float* x, float* out, int n,
                   int size);
void add_rows(cudaStream_t stream, float* x, const float* delta, int n, int size);
void scale_rows(cudaStream_t stream, float* x, float factor, int n, int size);
// rows (num_rows), each below num_source_rows.
void gather(cudaStream_t stream, const float* x, int num_source_rows, const int32_t* rows, int num_rows,
            float* out, int size);

}  // namespace engine::cuda
