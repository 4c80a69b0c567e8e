#include "device/edits.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"

namespace engine {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

int32_t checked(int32_t token, int32_t vocab, const char* rule) {
  check(token >= 0 && token < vocab, rule);
  return token;
}

std::span<const int32_t> output_of(const SamplingRow& row) {
  return row.tokens.subspan(static_cast<size_t>(row.num_prompt));
}

// Whether anything is left to draw when the stop tokens are held back. They are few, the mask is long.
bool allows_others(const SamplingRow& row, int32_t vocab) {
  const std::vector<int32_t>& stops = row.params->stop_token_ids;
  for (int32_t i = 0; i < vocab; ++i) {
    if (i % 32 == 0 && row.mask[i / 32] == 0) {
      i += 31;
      continue;
    }
    if (allows(row.mask, i) && std::ranges::find(stops, i) == stops.end()) return true;
  }
  return false;
}

}  // namespace

const std::vector<LogitEdit>& EditList::of(const SamplingRow& row, int32_t vocab) {
  edits_.clear();
  counts_.resize(static_cast<size_t>(vocab));
  mask_bad_words(row, vocab);
  mask_stop_tokens(row, vocab);
  for (const LogitEdit& masked : edits_) counts_[static_cast<size_t>(masked.token)] = 0;
  for (const auto& [token, bias] : row.params->logit_bias)
    edits_.push_back({checked(token, vocab, "logit_bias: tokens of the vocabulary"), bias, false});
  penalize(row, vocab);
  return edits_;
}

// Masks the last token of a sequence whose other tokens are the last of the output.
void EditList::mask_bad_words(const SamplingRow& row, int32_t vocab) {
  const auto output = output_of(row);
  for (const std::vector<int32_t>& word : row.params->bad_words) {
    check(!word.empty(), "a bad word has a token");
    const size_t before = word.size() - 1;
    if (before > output.size()) continue;
    if (std::equal(word.rbegin() + 1, word.rend(), output.rbegin()))
      mask(checked(word.back(), vocab, "bad_words: tokens of the vocabulary"));
  }
}

void EditList::mask_stop_tokens(const SamplingRow& row, int32_t vocab) {
  if (static_cast<int64_t>(output_of(row).size()) >= row.params->min_tokens) return;
  if (row.mask != nullptr && !allows_others(row, vocab)) return;
  for (const int32_t token : row.params->stop_token_ids)
    mask(checked(token, vocab, "stop_token_ids: tokens of the vocabulary"));
}

// Once, however many rules do: what a row takes is bounded by the vocabulary.
void EditList::mask(int32_t token) {
  if (counts_[static_cast<size_t>(token)]++ == 0) edits_.push_back({token, kMasked, false});
}

void EditList::penalize(const SamplingRow& row, int32_t vocab) {
  const SamplingParams& params = *row.params;
  if (params.repetition_penalty == 1 && params.frequency_penalty == 0 && params.presence_penalty == 0) return;
  for (const int32_t token : row.tokens) checked(token, vocab, "a sequence's tokens are in the vocabulary");
  if (params.repetition_penalty != 1) {
    for (const int32_t token : row.tokens)
      if (counts_[static_cast<size_t>(token)]++ == 0)
        edits_.push_back({token, params.repetition_penalty, true});
    for (const int32_t token : row.tokens) counts_[static_cast<size_t>(token)] = 0;
  }
  if (params.frequency_penalty == 0 && params.presence_penalty == 0) return;
  const auto output = output_of(row);
  for (const int32_t token : output) ++counts_[static_cast<size_t>(token)];
  for (const int32_t token : output) {
    const auto count = static_cast<float>(std::exchange(counts_[static_cast<size_t>(token)], 0));
    if (count == 0) continue;
    edits_.push_back({token, -(params.frequency_penalty * count), false});
    edits_.push_back({token, -params.presence_penalty, false});
  }
}

int32_t fallback_token(const SamplingRow& row, int32_t vocab) {
  const std::vector<int32_t>& allowed = row.params->allowed_token_ids;
  if (row.mask == nullptr) return allowed.empty() ? 0 : allowed[0];
  int32_t token = 0;
  while (token + 1 < vocab && !allows(row.mask, token)) ++token;
  return token;
}

}  // namespace engine
