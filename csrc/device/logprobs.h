// Log-probabilities out of the few logits that a device found.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "device/sampling.h"

namespace engine {

struct TokenLogit {
  int32_t token;
  float logit;
};

// The chosen token, and what it takes to know any other's log-probability.
struct ChosenLogit {
  int32_t token;
  float logit;
  int32_t rank;    // 1 + the tokens that are strictly more likely
  double log_sum;  // log Σ e^logit over the row; 0 if all are -inf, for then every log-probability is
};

// The chosen token, then the most likely ones, best first. `top` comes in any order.
TokenLogprobs top_logprobs(const ChosenLogit& chosen, std::vector<TokenLogit> top);
// The chosen token, then the named ones in their order, of which it is one: the first if it was not named.
TokenLogprobs named_logprobs(const ChosenLogit& chosen, std::span<const TokenLogit> named);

}  // namespace engine
