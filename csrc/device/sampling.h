// What a request asks of the sampler, and what one sampled row gives back.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace engine {

// Ends a sequence whose last tokens are one pattern of [min_pattern_size, max_pattern_size] tokens, min_count
// times in a row.
struct RepetitionDetection {
  int32_t max_pattern_size = 0;  // 0: off
  int32_t min_pattern_size = 1;
  int32_t min_count = 2;
};

// What a request wants of its prompt in place of an answer: one vector, made of the states of the last layer
// behind the final norm: that of the last token, or the mean of all.
enum class Pooling : uint8_t { NONE, LAST, MEAN };

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
  std::vector<int32_t> allowed_token_ids;             // the only ones that may be chosen; empty: all
  std::vector<std::vector<int32_t>> bad_words;        // sequences of tokens that the output never contains
  uint64_t seed = 0;
  int32_t num_logprobs =
      -1;  // -1: none; k: the chosen token's and the k most likely tokens' log-probabilities
  std::vector<int32_t> logprob_token_ids;  // the tokens whose log-probabilities to give in place of the top k
  int32_t num_prompt_logprobs = -1;        // likewise, of each prompt token behind those before it

  int32_t max_tokens = 16;
  int32_t min_tokens = 0;               // stop tokens are masked until so many tokens are out
  std::vector<int32_t> stop_token_ids;  // end-of-sequence tokens included, unless the request ignores them
  RepetitionDetection repetition_detection;

  Pooling pooling = Pooling::NONE;  // a vector in place of tokens: max_tokens is 0 then
  int64_t priority = 0;             // lower ones run first
  std::string cache_salt;           // prefixes are shared among requests of the same salt
  // Each token must be one that the request's constraint allows (engine/masks.h). Then min_tokens holds back
  // stop tokens only where the constraint allows others.
  bool constrained = false;
  bool eager = true;  // who reads wants every token at once; otherwise the first, and the rest with the last
};

// One row to sample: a pure function of these and the logits row.
struct SamplingRow {
  const SamplingParams* params;
  std::span<const int32_t> tokens;  // (num_prompt + num_output): the sequence so far
  int32_t num_prompt;
  uint64_t position;               // of the token being drawn, = tokens.size()
  const uint32_t* mask = nullptr;  // (ceil(vocab / 32)): bit i % 32 of word i / 32 allows token i; null: all
};

// One row whose next token is known already: its log-probability is wanted.
struct ScoringRow {
  int32_t token;
  int32_t num_logprobs;  // beside it, those of the k most likely tokens
};

struct TokenLogprob {
  int32_t token;
  float logprob;
  int32_t rank;  // 1: the most likely; 0: not counted, of logprob_token_ids
};

using TokenLogprobs = std::vector<TokenLogprob>;  // [0] is the chosen token, then the top k, best first

struct Sampled {
  int32_t token = -1;
  TokenLogprobs logprobs;  // empty unless asked for
};

}  // namespace engine
