// The sampler of the CUDA device. What is few and of odd shape is prepared here: which tokens a request's
// rules touch (device/edits.h), masks, random numbers. Kernels do what a whole row of logits takes
// (sample.h); tokens and the logits that were asked for come back, and become log-probabilities here.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cuda/runtime.h"
#include "cuda/sample.h"
#include "device/edits.h"
#include "device/sampling.h"

namespace engine::cuda {

class CudaSampler {
 public:
  explicit CudaSampler(Arena& arena) : parcel_(arena), results_(arena) {}
  // All that any step takes: rows go to the GPU in pieces, whose last row may do to every token whatever
  // requests do.
  void reserve(int vocab);
  // See Device.
  void sample(cudaStream_t stream, float* logits, int vocab, std::span<const SamplingRow> rows,
              std::span<Sampled> out);
  void score(cudaStream_t stream, float* logits, int vocab, std::span<const ScoringRow> rows,
             std::span<TokenLogprobs> out);

 private:
  struct Task {  // for the GPU: arrays as sample.h has them
    std::vector<DrawRow> draws;
    std::vector<uint32_t> masks;
    std::vector<LogitEdit> edits;
    std::vector<LogprobRow> wanted;
    std::vector<int32_t> named;
    size_t num_found = 0;

    bool is_large() const;
  };
  struct Findings {  // of the GPU
    std::vector<int32_t> tokens;
    std::vector<LogprobSums> sums;
    std::vector<TokenLogit> found;
  };

  void add_draw(const SamplingRow& row, int vocab, Task& task);
  void add_score(const ScoringRow& row, int vocab, Task& task);
  Findings run(cudaStream_t stream, float* logits, int num_rows, int vocab, const Task& task);

  EditList edits_;
  DeviceMemory parcel_, results_;
};

}  // namespace engine::cuda
