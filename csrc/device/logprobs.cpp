#include "device/logprobs.h"

#include <algorithm>

namespace engine {
namespace {

TokenLogprob logprob(const ChosenLogit& chosen, TokenLogit one, int32_t rank) {
  return {one.token, static_cast<float>(one.logit - chosen.log_sum), rank};
}

}  // namespace

TokenLogprobs top_logprobs(const ChosenLogit& chosen, std::vector<TokenLogit> top) {
  std::ranges::sort(top, [](const TokenLogit& a, const TokenLogit& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  });
  TokenLogprobs out{logprob(chosen, {chosen.token, chosen.logit}, chosen.rank)};
  out.reserve(1 + top.size());
  for (size_t i = 0; i < top.size(); ++i) {
    const bool equal = i > 0 && top[i].logit == top[i - 1].logit;
    out.push_back(logprob(chosen, top[i], equal ? out.back().rank : static_cast<int32_t>(i) + 1));
  }
  return out;
}

TokenLogprobs named_logprobs(const ChosenLogit& chosen, std::span<const TokenLogit> named) {
  TokenLogprobs out{logprob(chosen, {chosen.token, chosen.logit}, chosen.rank)};
  if (std::ranges::find(named, chosen.token, &TokenLogit::token) == named.end()) out.push_back(out[0]);
  for (const TokenLogit& one : named) out.push_back(logprob(chosen, one, 0));
  return out;
}

}  // namespace engine
