// y = x · weightᵀ + bias on tensor cores, and rows of an embedding table.
//
// Exactly: weights are dequantised to f32, and f32 numbers are split into up to three bf16 ones that add up
// to them (Henry, Tang & Heinecke, ARITH 2019); products of terms that are beyond f32's 24 bits are left out.
// In integers: activations become bytes with a scale per 32 columns, as on the CPU, and a group's dot product
// is exact.
#pragma once

#include <cuda_runtime.h>

#include "cuda/packed_weight.h"

namespace engine::cuda {

// Activations as the kernels read them; room that grows.
struct LinearScratch {
  explicit LinearScratch(Arena& arena) : terms(arena), quants(arena), scales(arena), sums(arena) {}
  // For x (n, cols), whichever way it is multiplied.
  void reserve(int n, int cols);
  void reserve_terms(int n, int cols);
  void reserve_quants(int n, int cols);

  DeviceMemory terms;   // bf16: (terms, tiles of 8 rows, steps, 32 lanes, 8)
  DeviceMemory quants;  // int8: (tiles, steps, 32 lanes, 8)
  DeviceMemory scales;  // f32: (tiles, steps, 8)
  DeviceMemory sums;    // int2: (tiles, steps, 8): of the quants of each 16 columns
};

// x (n, weight.cols), y (n, weight.rows).
void multiply(cudaStream_t stream, const CudaWeight& weight, const float* x, float* y, int n,
              LinearScratch& scratch);
// tokens (n) in device memory, all of them rows of the table; out (n, table.cols).
void embed_rows(cudaStream_t stream, const CudaWeight& table, const int32_t* tokens, int n, float* out);

}  // namespace engine::cuda
