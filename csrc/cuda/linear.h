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

inline constexpr int kTileTokens = 8;

// Tiles that hold n tokens.
int tiles_of(int n);
// Tiles that a block of threads multiplies at once, where there are so many tokens for a matrix.
int tiles_at_once(int tokens);

// The choices of a mixture of experts (experts.h) in tiles, those of an expert from a multiple of `at_once`
// on. In device memory.
struct ExpertTiles {
  const int32_t* experts;  // (count) that a tile's choices are multiplied by; -1: the tile is empty
  const int32_t* choices;  // (count, kTileTokens): rows of x and y; -1: none. Of empty tiles undefined
  int count, at_once, num_experts;
};

// Activations as the kernels read them; room that grows.
struct LinearScratch {
  explicit LinearScratch(Arena& arena) : terms(arena), quants(arena), scales(arena), sums(arena) {}
  // For so many places where a tile of tokens meets a step of columns, whichever way they are multiplied.
  void reserve(size_t places);
  void reserve_terms(size_t places);
  void reserve_quants(size_t places);
  static size_t places(int tiles, int cols);

  DeviceMemory terms;   // bf16: (terms, tiles of 8 rows, steps, 32 lanes, 8)
  DeviceMemory quants;  // int8: (tiles, steps, 32 lanes, 8)
  DeviceMemory scales;  // f32: (tiles, steps, 8)
  DeviceMemory sums;    // int2: (tiles, steps, 8): of the quants of each 16 columns
};

// x (n, weight.cols), y (n, weight.rows).
void multiply(cudaStream_t stream, const CudaWeight& weight, const float* x, float* y, int n,
              LinearScratch& scratch);
// Each choice by its expert's matrix, of those stacked in a weight: x (n, experts.cols), y (n, experts.rows /
// num_experts).
void multiply_experts(cudaStream_t stream, const CudaWeight& experts, const ExpertTiles& tiles,
                      const float* x, float* y, int n, LinearScratch& scratch);
// tokens (n) in device memory, all of them rows of the table; out (n, table.cols).
void embed_rows(cudaStream_t stream, const CudaWeight& table, const int32_t* tokens, int n, float* out);

}  // namespace engine::cuda
