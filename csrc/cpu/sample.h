// From logits to tokens: a pure function of one row of logits, its request's parameters, the tokens so far
// and the position. The order is vLLM's: the mask of a constraint; log-probabilities of what it leaves;
// allowed_token_ids, bad_words,
// logit_bias and min_tokens; penalties; greedy or temperature, min_p, top_k, top_p and a draw. A NaN counts
// as -inf.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
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
  struct Scratch {                // of one worker
    std::vector<float> raw;       // (vocab): the logits as they came
    std::vector<float> weights;   // (vocab)
    std::vector<int32_t> counts;  // (vocab), all 0 between rows
    std::vector<float> allowed;   // the logits of allowed_token_ids
    std::vector<int32_t> indices;
    std::vector<Candidate> candidates;  // by ascending token
    std::vector<Candidate> ordered;     // the same in another order
  };

  void sample_row(std::span<float> logits, const SamplingRow& row, Scratch& scratch, Sampled& out) const;
  int32_t draw(std::span<float> logits, const SamplingRow& row, Scratch& scratch) const;
  void collect(std::span<float> logits, const SamplingParams& params, Scratch& scratch) const;
  double log_sum_exp(std::span<const float> logits, Scratch& scratch) const;
  TokenLogprobs logprobs(std::span<const float> raw, int32_t token, int32_t num_top, Scratch& scratch) const;
  TokenLogprobs logprobs(std::span<const float> raw, int32_t token, std::span<const int32_t> others,
                         Scratch& scratch) const;
  TokenLogprobs named_logprobs(std::span<const float> raw, int32_t token, std::span<const int32_t> named,
                               Scratch& scratch) const;
  static void restrict(std::span<float> logits, const SamplingRow& row, std::vector<float>& allowed);
  static void penalize(std::span<float> logits, const SamplingRow& row, std::vector<int32_t>& counts);
  static void keep_top_p(float top_p, Scratch& scratch);

  const PointwiseKernels& kernels_;
  ThreadPool& pool_;
  std::vector<Scratch> scratch_;  // (pool_.size())
};

}  // namespace engine
