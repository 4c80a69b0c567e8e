// CUDA graphs of steps: what a step launches is recorded once and then replayed with a single call, for a
// CPU takes longer to launch a small step's kernels than a GPU to run them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <type_traits>
#include <vector>

#include "cuda/arena.h"

namespace engine::cuda {

// All that launches depend on beside numbers in device memory: two steps of the same shape launch the same.
using StepShape = std::vector<int64_t>;

class Graphs {
 public:
  explicit Graphs(const Arena& arena) : arena_(arena) {}

  // Runs launch() in `stream`, which launches for this shape and nothing else: directly the first time, when
  // scratch may still grow and CUDA loads kernels, then recorded and replayed.
  void run(cudaStream_t stream, const StepShape& shape, const std::function<void()>& launch);
  int64_t replays() const { return replays_; }
  size_t size() const { return steps_.size(); }

  static constexpr size_t kMost = 64;  // shapes that are remembered

 private:
  struct Destroy {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  struct Step {
    StepShape shape;
    std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Destroy> graph;  // null: seen once
  };

  void forget_moved();  // graphs know addresses

  const Arena& arena_;
  uint64_t returns_ = 0;   // of the arena, when the graphs were recorded
  std::list<Step> steps_;  // the latest first
  int64_t replays_ = 0;
};

}  // namespace engine::cuda
