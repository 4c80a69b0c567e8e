// What a request does to the logits of a row before anything is drawn: the rules that all devices share, as
// a list of the few tokens that they touch.
#pragma once

#include <cstdint>
#include <vector>

#include "device/sampling.h"

namespace engine {

inline constexpr float kGreedyBelow = 1e-5f;           // temperature; as in vLLM
inline constexpr int32_t kMostTokens = (1 << 21) - 1;  // of a vocabulary: sums of weights fit 63 bits
inline constexpr int kMostEditsPerToken = 5;           // a mask, a bias, three penalties; see EditList::of

// Adds `value` to the logit of a token, or, as a repetition penalty, divides it by `value` when it is
// positive and multiplies it otherwise. Adding -inf masks it.
struct LogitEdit {
  int32_t token;
  float value;
  bool penalty;
};

class EditList {
 public:
  // In vLLM's order, which counts for edits of the same token: what bad_words and min_tokens mask (whatever
  // comes later leaves that masked), logit_bias, then repetition (over prompt and output), frequency and
  // presence (over the output alone). Each of these edits a token once at most, if logit_bias names it once,
  // as validate() sees to. Valid until the next call.
  const std::vector<LogitEdit>& of(const SamplingRow& row, int32_t vocab);

 private:
  void mask_bad_words(const SamplingRow& row, int32_t vocab);
  void mask_stop_tokens(const SamplingRow& row, int32_t vocab);
  void mask(int32_t token);
  void penalize(const SamplingRow& row, int32_t vocab);

  std::vector<LogitEdit> edits_;
  std::vector<int32_t> counts_;  // (vocab), all 0 between rows
};

// What is taken when every logit is -inf: a token that the row's constraints allow.
int32_t fallback_token(const SamplingRow& row, int32_t vocab);

inline bool allows(const uint32_t* mask, int32_t token) {
  return (mask[token / 32] >> (token % 32) & 1) != 0;
}

}  // namespace engine
