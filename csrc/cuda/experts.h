// A mixture of experts, as device/device.h describes it: which experts rows go to, and what their choices add
// up to. The choices of a row stand one after the other, that of the largest score first; tiles say which of
// them an expert has.
#pragma once

#include <cuda_runtime.h>

#include "cuda/linear.h"
#include "cuda/runtime.h"
#include "device/device.h"

namespace engine::cuda {

class CudaRouting : public Routing {
 public:
  CudaRouting(Arena& arena, const ModelConfig& config, int max_tokens);
  static size_t bytes(const ModelConfig& config, int max_tokens);
  // The most that the choices of n rows may take.
  static ExpertTiles most_tiles(const ModelConfig& config, int n);

  // Chooses for the rows of scores (n, num_experts), and sorts the choices.
  void route(cudaStream_t stream, const ModelConfig& config, const float* scores, int n);
  // Those of the rows that were routed last.
  int num_choices() const { return n_ * per_row_; }
  const ExpertTiles& tiles() const { return tiles_; }
  void dispatch(cudaStream_t stream, const float* x, float* out, int size) const;
  void combine(cudaStream_t stream, const float* y, float* out, int size) const;

 private:
  int max_tokens_, per_row_, n_ = 0;
  ExpertTiles tiles_{};
  DeviceMemory experts_, shares_;             // int32 and f32: (max_tokens, per_row)
  DeviceMemory tile_experts_, tile_choices_;  // int32: see ExpertTiles
};

}  // namespace engine::cuda
