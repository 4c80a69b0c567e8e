#include "engine/request.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace engine {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// NaN is in no range.
template <typename T>
void check_range(const char* name, T value, T low, T high) {
  if (!(value >= low && value <= high))
    refuse(name, " must be between ", low, " and ", high, ", got ", value);
}

template <typename T>
void check_not_negative(const char* name, T value) {
  if (!(value >= 0 && value <= std::numeric_limits<T>::max()))
    refuse(name, " must be a finite number of at least 0, got ", value);
}

void check_token(const char* name, int32_t token, int32_t vocab_size) {
  if (token < 0 || token >= vocab_size)
    refuse(name, " must be token ids between 0 and ", vocab_size - 1, ", got ", token);
}

// So there are at most as many as the vocabulary has, which is what devices make room for.
void check_named_once(const char* name, std::vector<int32_t> tokens) {
  std::ranges::sort(tokens);
  const auto twice = std::ranges::adjacent_find(tokens);
  if (twice != tokens.end()) refuse(name, " must name each token once, got ", *twice, " more than once");
}

constexpr int32_t kMaxPatternSize = 1024;  // every token is compared with so many before it

void validate_sampling(const SamplingParams& params, int32_t vocab_size) {
  check_not_negative("temperature", params.temperature);
  if (!(params.top_p > 0 && params.top_p <= 1))
    refuse("top_p must be above 0 and at most 1, got ", params.top_p);
  check_range("min_p", params.min_p, 0.0f, 1.0f);
  check_not_negative("top_k", params.top_k);
  check_range("presence_penalty", params.presence_penalty, -2.0f, 2.0f);
  check_range("frequency_penalty", params.frequency_penalty, -2.0f, 2.0f);
  if (!(params.repetition_penalty > 0 && std::isfinite(params.repetition_penalty)))
    refuse("repetition_penalty must be a finite number above 0, got ", params.repetition_penalty);
  std::vector<int32_t> biased;
  for (const auto& [token, bias] : params.logit_bias) {
    check_token("logit_bias keys", token, vocab_size);
    if (!std::isfinite(bias)) refuse("logit_bias of token ", token, " must be finite, got ", bias);
    biased.push_back(token);
  }
  check_named_once("logit_bias", std::move(biased));
  check_range("num_logprobs", params.num_logprobs, -1, vocab_size);
  check_range("num_prompt_logprobs", params.num_prompt_logprobs, -1, vocab_size);
  for (int32_t token : params.allowed_token_ids) check_token("allowed_token_ids", token, vocab_size);
  for (int32_t token : params.logprob_token_ids) check_token("logprob_token_ids", token, vocab_size);
  check_named_once("logprob_token_ids", params.logprob_token_ids);
  for (const std::vector<int32_t>& word : params.bad_words) {
    if (word.empty()) refuse("bad_words must hold at least one token each");
    for (int32_t token : word) check_token("bad_words", token, vocab_size);
  }
}

void validate_repetition_detection(const RepetitionDetection& detection) {
  if (detection.max_pattern_size == 0) return;
  check_range("repetition_detection.max_pattern_size", detection.max_pattern_size, 1, kMaxPatternSize);
  check_range("repetition_detection.min_pattern_size", detection.min_pattern_size, 1,
              detection.max_pattern_size);
  check_range("repetition_detection.min_count", detection.min_count, 2, std::numeric_limits<int32_t>::max());
}

void validate_stopping(const SamplingParams& params, int32_t vocab_size) {
  if (params.max_tokens < 0) refuse("max_tokens must be at least 0, got ", params.max_tokens);
  check_range("min_tokens", params.min_tokens, 0, params.max_tokens);
  for (int32_t token : params.stop_token_ids) check_token("stop_token_ids", token, vocab_size);
  validate_repetition_detection(params.repetition_detection);
}

void validate_pooling(const SamplingParams& params) {
  if (params.pooling == Pooling::NONE) return;
  if (params.max_tokens != 0) refuse("max_tokens must be 0 with pooling, got ", params.max_tokens);
  if (params.num_prompt_logprobs >= 0)
    refuse("num_prompt_logprobs must be -1 with pooling, got ", params.num_prompt_logprobs);
  if (params.constrained) refuse("constrained must be false with pooling");
}

}  // namespace

void validate(const Request& request, int32_t vocab_size, int32_t max_model_len, int64_t cache_tokens) {
  if (request.prompt.empty()) refuse("prompt must hold at least one token");
  for (int32_t token : request.prompt) check_token("prompt", token, vocab_size);
  validate_sampling(request.params, vocab_size);
  validate_stopping(request.params, vocab_size);
  validate_pooling(request.params);

  const auto prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t max_tokens = request.params.max_tokens;
  if (prompt + max_tokens > max_model_len)
    refuse("prompt and max_tokens together must be at most max_model_len = ", max_model_len, " tokens, got ",
           prompt, " + ", max_tokens);
  if (prompt + max_tokens > cache_tokens)
    refuse("prompt and max_tokens together must fit in the key/value cache of ", cache_tokens,
           " tokens, got ", prompt, " + ", max_tokens, "; give the engine more memory");
}

}  // namespace engine
