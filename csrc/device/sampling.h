// What a request asks of the sampler, and what one sampled row gives back.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace engine {

// Defaults are vLLM's. Ranges are checked once, by validate() (engine/request.h), in the caller of submit().
struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy
  float top_p = 1.0f;
  float min_p = 0.0f;
  int32_t top_k = 0;  // 0: all
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;
  std::vector<std::pair<int32_t, float>> logit_bias;  // (token, added to its logit)
  uint64_t seed = 0;
  int32_t num_logprobs =
      -1;  // -1: none; k: the chosen token's and the k most likely tokens' log-probabilities

  int32_t max_tokens = 16;
  int32_t min_tokens = 0;               // stop tokens are masked until so many tokens are out
  std::vector<int32_t> stop_token_ids;  // end-of-sequence tokens included, unless the request ignores them
};

// One row to sample: a pure function of these and the logits row.
struct SamplingRow {
  const SamplingParams* params;
  std::span<const int32_t> tokens;  // (num_prompt + num_output): the sequence so far
  int32_t num_prompt;
  uint64_t position;  // of the token being drawn, = tokens.size()
};

struct TokenLogprob {
  int32_t token;
  float logprob;
  int32_t rank;  // 1: the most likely
};

struct Sampled {
  int32_t token = -1;
  std::vector<TokenLogprob>
      logprobs;  // empty unless asked for; [0] is the chosen token, then the top k, best first
};

}  // namespace engine
