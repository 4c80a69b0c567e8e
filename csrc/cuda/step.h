// What a step's launches read of its batch, in a GPU's memory: brought there at once, before the launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>
#include <vector>

#include "cuda/attention.h"
#include "cuda/graphs.h"
#include "cuda/runtime.h"
#include "device/device.h"

namespace engine::cuda {

// Of attention's work: blocks below which partitions are worked on apart, and the most of them.
struct SplitLimits {
  int enough_blocks, max_partials;
};

class StagedStep {
 public:
  explicit StagedStep(Arena& arena) : memory_(arena), partials_(arena) {}

  // Room for every step of at most max_tokens tokens and max_blocks entries in its block tables.
  void reserve(const ModelConfig& config, int max_tokens, int64_t max_blocks, const SplitLimits& limits);
  // Padded: sizes become powers of two, with tokens and rows of logits that belong to no sequence, and parts
  // of the plan that are none. Where everything lies then depends on the shape alone.
  void bring(cudaStream_t stream, const ModelConfig& config, const Batch& batch, const SplitLimits& limits,
             bool padded);
  bool holds(const ModelConfig& config, const Batch& batch) const;

  const Batch& batch() const { return batch_; }  // padded as well
  const DeviceBatch& on_device() const { return on_device_; }
  const DevicePlan& plan(int window) const;
  const StepShape& shape() const { return shape_; }
  int32_t largest_block() const { return largest_block_; }
  // Where the batch's own tokens or rows of logits lie; null for any others.
  const int32_t* find(std::span<const int32_t> indices) const;

 private:
  struct WindowPlan {
    int window;
    size_t tiles, pieces, split_tiles;  // where they start
    DevicePlan on_device;
  };

  void locate(const ModelConfig& config, int num_partials);

  const ModelConfig* config_ = nullptr;
  Batch batch_;
  size_t tokens_ = 0, positions_ = 0, slots_ = 0, tables_ = 0, rows_ = 0;  // where they start in memory_
  StepShape shape_;
  int32_t largest_block_ = -1;
  DeviceBatch on_device_;
  std::vector<WindowPlan> plans_;
  DeviceMemory memory_, partials_;
};

// That of a layer; 0: none.
int window_of(const ModelConfig& config, int layer);

}  // namespace engine::cuda
