// From logits to tokens: a pure function of one row of logits, its request's parameters, the tokens so far
// and the position. The order is vLLM's: the mask of a constraint; log-probabilities of what it leaves;
// allowed_token_ids; the edits of device/edits.h; greedy or temperature, min_p, top_k, top_p and a draw. A
// NaN counts as -inf. Weights are added up as integers (mass()), so a sum has no order, and other devices
// draw the same.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "device/edits.h"
#include "device/logprobs.h"
#include "device/sampling.h"

namespace engine {

class Sampler {
 public:
  Sampler(const Kernels& kernels, ThreadPool& pool) : kernels_(*kernels.pointwise), pool_(pool) {}

  // See Device.
  void sample(float* logits, int vocab, std::span<const SamplingRow> rows, std::span<Sampled> out);
  void score(float* logits, int vocab, std::span<const ScoringRow> rows, std::span<TokenLogprobs> out);

 private:
  struct Candidate {
    int32_t token;
    float weight;  // its probability over the most likely token's
  };
  struct Scratch {               // of one worker
    std::vector<float> raw;      // (vocab): the logits as they came
    std::vector<float> weights;  // (vocab)
    EditList edits;
    std::vector<float> allowed;  // the logits of allowed_token_ids
    std::vector<int32_t> indices;
    std::vector<Candidate> candidates;  // by ascending token
    std::vector<Candidate> ordered;     // the same in another order
  };

  void sample_row(std::span<float> logits, const SamplingRow& row, Scratch& scratch, Sampled& out) const;
  int32_t draw(std::span<float> logits, const SamplingRow& row, Scratch& scratch) const;
  void collect(std::span<float> logits, const SamplingParams& params, Scratch& scratch) const;
  double log_sum_exp(std::span<const float> logits, Scratch& scratch) const;
  ChosenLogit chosen(std::span<const float> raw, int32_t token, Scratch& scratch) const;
  static void restrict(std::span<float> logits, const SamplingRow& row, std::vector<float>& allowed);
  static int64_t total_mass(std::span<const Candidate> candidates);
  static void keep_top_p(float top_p, Scratch& scratch);

  const PointwiseKernels& kernels_;
  ThreadPool& pool_;
  std::vector<Scratch> scratch_;  // (pool_.size())
};

}  // namespace engine
