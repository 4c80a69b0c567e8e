#include "cpu/sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/random.h"
#include "cpu/pointwise.h"

namespace engine {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kGreedyBelow = 1e-5f;  // temperature; as in vLLM

// NaN becomes -inf, +inf the largest number, so that differences from the maximum are numbers.
void make_comparable(std::span<float> logits) {
  constexpr float highest = std::numeric_limits<float>::max();
  for (float& x : logits) x = x > kLowest ? (x < highest ? x : highest) : kLowest;
}

// In the order of the greatest first, equal ones by index: a total order, so that every choice is determined.
struct Greater {
  const float* x;
  bool operator()(int32_t a, int32_t b) const { return x[a] != x[b] ? x[a] > x[b] : a < b; }
};

// The k first indices of x in the order of Greater, in no order themselves. One pass; most numbers only meet
// the threshold.
void find_greatest(std::span<const float> x, size_t k, std::vector<int32_t>& found) {
  found.clear();
  if (k == 0) return;
  const auto cut = [&] {
    std::nth_element(found.begin(), found.begin() + static_cast<int64_t>(k) - 1, found.end(),
                     Greater{x.data()});
    found.resize(k);
  };
  const size_t room = 4 * k + 64;
  bool full = false;
  float threshold = kLowest;
  for (size_t i = 0; i < x.size(); ++i) {
    if (full && !(x[i] > threshold)) continue;  // k earlier ones are at least as great
    found.push_back(static_cast<int32_t>(i));
    if (found.size() < room) continue;
    cut();
    full = true;
    threshold = x[static_cast<size_t>(found.back())];
  }
  if (found.size() > k) cut();
}

// In eight chains, for speed; their number is fixed, so the sum is too.
double sum(std::span<const float> x) {
  std::array<double, 8> chains{};
  size_t i = 0;
  for (; i + 8 <= x.size(); i += 8)
    for (size_t c = 0; c < 8; ++c) chains[c] += x[i + c];
  for (; i < x.size(); ++i) chains[0] += x[i];
  return ((chains[0] + chains[1]) + (chains[2] + chains[3])) +
         ((chains[4] + chains[5]) + (chains[6] + chains[7]));
}

float& logit(std::span<float> logits, int32_t token, const char* rule) {
  check(token >= 0 && static_cast<size_t>(token) < logits.size(), rule);
  return logits[static_cast<size_t>(token)];
}

// Masks the last token of a sequence whose other tokens are the last of the output.
void mask_bad_words(std::span<float> logits, const SamplingRow& row) {
  const auto output = row.tokens.subspan(static_cast<size_t>(row.num_prompt));
  for (const std::vector<int32_t>& word : row.params->bad_words) {
    check(!word.empty(), "a bad word has a token");
    const size_t before = word.size() - 1;
    if (before > output.size()) continue;
    if (std::equal(word.rbegin() + 1, word.rend(), output.rbegin()))
      logit(logits, word.back(), "bad_words: tokens of the vocabulary") = kLowest;
  }
}

bool allows(const uint32_t* mask, size_t token) {
  return (mask[token / 32] >> (token % 32) & 1) != 0;
}

void apply_mask(std::span<float> logits, const uint32_t* mask) {
  for (size_t begin = 0; begin < logits.size(); begin += 32) {
    const uint32_t word = mask[begin / 32];
    if (word == ~0u) continue;
    const size_t end = std::min(begin + 32, logits.size());
    for (size_t i = begin; i < end; ++i)
      if (!allows(mask, i)) logits[i] = kLowest;
  }
}

int32_t first_allowed(const uint32_t* mask, size_t vocab) {
  size_t token = 0;
  while (token + 1 < vocab && !allows(mask, token)) ++token;
  return static_cast<int32_t>(token);
}

// Whether anything is left to draw when the stop tokens are held back. They are few, the mask is long.
bool allows_others(const SamplingRow& row, size_t vocab) {
  for (size_t i = 0; i < vocab; ++i) {
    if (i % 32 == 0 && row.mask[i / 32] == 0) {
      i += 31;
      continue;
    }
    if (allows(row.mask, i) && std::ranges::find(row.params->stop_token_ids, static_cast<int32_t>(i)) ==
                                   row.params->stop_token_ids.end())
      return true;
  }
  return false;
}

// What changes logits before anything is drawn, but for the penalties.
void apply_bias(std::span<float> logits, const SamplingRow& row) {
  const SamplingParams& params = *row.params;
  mask_bad_words(logits, row);
  for (const auto& [token, bias] : params.logit_bias)
    logit(logits, token, "logit_bias: tokens of the vocabulary") += bias;
  const auto num_output = static_cast<int64_t>(row.tokens.size()) - row.num_prompt;
  if (num_output >= params.min_tokens) return;
  if (row.mask != nullptr && !allows_others(row, logits.size())) return;
  for (const int32_t token : params.stop_token_ids)
    logit(logits, token, "stop_token_ids: tokens of the vocabulary") = kLowest;
}

int32_t argmax(std::span<const float> logits, float greatest) {
  const auto found = std::find(logits.begin(), logits.end(), greatest);
  return found == logits.end() ? 0 : static_cast<int32_t>(found - logits.begin());
}

}  // namespace

void Sampler::sample(float* logits, int vocab, std::span<const SamplingRow> rows, std::span<Sampled> out) {
  check(vocab > 0 && rows.size() == out.size(), "sample: one result per row");
  scratch_.resize(static_cast<size_t>(pool_.size()));
  pool_.run(static_cast<int>(rows.size()), [&](int row, int worker) {
    const auto i = static_cast<size_t>(row), width = static_cast<size_t>(vocab);
    sample_row({logits + i * width, width}, rows[i], scratch_[static_cast<size_t>(worker)], out[i]);
  });
}

void Sampler::sample_row(std::span<float> logits, const SamplingRow& row, Scratch& scratch,
                         Sampled& out) const {
  const SamplingParams& params = *row.params;
  make_comparable(logits);
  if (row.mask != nullptr) apply_mask(logits, row.mask);
  if (params.num_logprobs >= 0) scratch.raw.assign(logits.begin(), logits.end());
  restrict(logits, row, scratch.allowed);
  apply_bias(logits, row);
  penalize(logits, row, scratch.counts);
  out.token = draw(logits, row, scratch);
  out.logprobs.clear();
  if (params.num_logprobs < 0) return;
  if (params.logprob_token_ids.empty())
    out.logprobs = logprobs(scratch.raw, out.token, params.num_logprobs, scratch);
  else
    out.logprobs = named_logprobs(scratch.raw, out.token, params.logprob_token_ids, scratch);
}

void Sampler::score(float* logits, int vocab, std::span<const ScoringRow> rows,
                    std::span<TokenLogprobs> out) {
  check(vocab > 0 && rows.size() == out.size(), "score: one result per row");
  scratch_.resize(static_cast<size_t>(pool_.size()));
  pool_.run(static_cast<int>(rows.size()), [&](int row, int worker) {
    const auto i = static_cast<size_t>(row), width = static_cast<size_t>(vocab);
    const std::span<float> raw(logits + i * width, width);
    make_comparable(raw);
    out[i] = logprobs(raw, rows[i].token, rows[i].num_logprobs, scratch_[static_cast<size_t>(worker)]);
  });
}

// Only the allowed tokens keep their logits.
void Sampler::restrict(std::span<float> logits, const SamplingRow& row, std::vector<float>& allowed) {
  const std::vector<int32_t>& tokens = row.params->allowed_token_ids;
  if (tokens.empty()) return;
  allowed.clear();
  for (const int32_t token : tokens)
    allowed.push_back(logit(logits, token, "allowed_token_ids: tokens of the vocabulary"));
  std::ranges::fill(logits, kLowest);
  for (size_t i = 0; i < tokens.size(); ++i) logits[static_cast<size_t>(tokens[i])] = allowed[i];
}

// Repetition over prompt and output, frequency and presence over the output alone.
void Sampler::penalize(std::span<float> logits, const SamplingRow& row, std::vector<int32_t>& counts) {
  const SamplingParams& params = *row.params;
  if (params.repetition_penalty == 1 && params.frequency_penalty == 0 && params.presence_penalty == 0) return;
  for (const int32_t token : row.tokens)
    check(token >= 0 && static_cast<size_t>(token) < logits.size(),
          "a sequence's tokens are in the vocabulary");
  counts.resize(logits.size());
  const auto output = row.tokens.subspan(static_cast<size_t>(row.num_prompt));
  for (const int32_t token : row.tokens) {
    if (counts[static_cast<size_t>(token)]++ > 0) continue;
    float& logit = logits[static_cast<size_t>(token)];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
  }
  for (const int32_t token : row.tokens) counts[static_cast<size_t>(token)] = 0;
  for (const int32_t token : output) ++counts[static_cast<size_t>(token)];
  for (const int32_t token : output) {
    const auto count = static_cast<float>(std::exchange(counts[static_cast<size_t>(token)], 0));
    if (count == 0) continue;
    logits[static_cast<size_t>(token)] -= params.frequency_penalty * count;
    logits[static_cast<size_t>(token)] -= params.presence_penalty;
  }
}

int32_t Sampler::draw(std::span<float> logits, const SamplingRow& row, Scratch& scratch) const {
  make_comparable(logits);
  const SamplingParams& params = *row.params;
  const float greatest = kernels_.max(logits.data(), logits.size());
  if (greatest == kLowest && row.mask != nullptr) return first_allowed(row.mask, logits.size());
  if (greatest == kLowest && !params.allowed_token_ids.empty()) return params.allowed_token_ids[0];
  if (params.temperature < kGreedyBelow || greatest == kLowest) return argmax(logits, greatest);
  collect(logits, params, scratch);
  if (params.top_p < 1) keep_top_p(params.top_p, scratch);

  double total = 0;
  for (const Candidate& candidate : scratch.candidates) total += candidate.weight;
  double left = random_uniform(params.seed, row.position) * total;
  for (const Candidate& candidate : scratch.candidates) {
    left -= candidate.weight;
    if (left < 0) return candidate.token;
  }
  return scratch.candidates.back().token;  // `left` was lost to rounding
}

// The candidates that min_p and top_k leave. Of tokens equal to the last of top_k those of lower id stay.
void Sampler::collect(std::span<float> logits, const SamplingParams& params, Scratch& scratch) const {
  const float greatest = kernels_.max(logits.data(), logits.size()), factor = 1 / params.temperature;
  const bool all = params.top_k <= 0 || static_cast<size_t>(params.top_k) >= logits.size();
  size_t n = logits.size();
  if (!all) {
    n = static_cast<size_t>(params.top_k);
    find_greatest(logits, n, scratch.indices);
    std::sort(scratch.indices.begin(), scratch.indices.end());
    for (size_t i = 0; i < n; ++i) logits[i] = logits[static_cast<size_t>(scratch.indices[i])];
  }
  scratch.weights.resize(logits.size());
  kernels_.exp(logits.data(), greatest, factor, scratch.weights.data(), n);
  scratch.candidates.clear();
  for (size_t i = 0; i < n; ++i) {
    const float weight = scratch.weights[i];
    if (weight > 0 && weight >= params.min_p)
      scratch.candidates.push_back({all ? static_cast<int32_t>(i) : scratch.indices[i], weight});
  }
}

// Keeps the heaviest candidates, up to and with the one that reaches top_p of their mass; the order of
// Greater decides between equals. Halves the range in which the last one kept lies, in linear time: nothing
// is sorted.
void Sampler::keep_top_p(float top_p, Scratch& scratch) {
  const auto heavier = [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
  };
  double total = 0;
  for (const Candidate& candidate : scratch.candidates) total += candidate.weight;
  // Those lighter than this have together less than 1 - top_p of the mass.
  const double light =
      (1 - static_cast<double>(top_p)) * total / static_cast<double>(scratch.candidates.size());
  std::erase_if(scratch.candidates, [&](const Candidate& candidate) { return candidate.weight < light; });

  scratch.ordered = scratch.candidates;
  auto begin = scratch.ordered.begin(), end = scratch.ordered.end();
  double missing = static_cast<double>(top_p) * total;  // what the candidates before `begin` leave
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, heavier);
    double mass = 0;
    for (auto candidate = begin; candidate != middle; ++candidate) mass += candidate->weight;
    if (mass >= missing) {
      end = middle;
    } else {
      missing -= mass;
      begin = middle;
    }
  }
  const Candidate last = *begin;
  std::erase_if(scratch.candidates, [&](const Candidate& candidate) { return heavier(last, candidate); });
}

double Sampler::log_sum_exp(std::span<const float> logits, Scratch& scratch) const {
  const float greatest = kernels_.max(logits.data(), logits.size());
  if (greatest == kLowest) return 0;  // every log-probability is -inf
  scratch.weights.resize(logits.size());
  kernels_.exp(logits.data(), greatest, 1, scratch.weights.data(), logits.size());
  return greatest + std::log(sum(scratch.weights));
}

// The token's, then the greatest ones, best first.
TokenLogprobs Sampler::logprobs(std::span<const float> raw, int32_t token, int32_t num_top,
                                Scratch& scratch) const {
  find_greatest(raw, std::min(raw.size(), static_cast<size_t>(num_top)), scratch.indices);
  std::ranges::sort(scratch.indices, Greater{raw.data()});
  TokenLogprobs out = logprobs(raw, token, scratch.indices, scratch);
  for (size_t i = 1; i < out.size(); ++i) {
    const bool equal =
        i > 1 && raw[static_cast<size_t>(out[i].token)] == raw[static_cast<size_t>(out[i - 1].token)];
    out[i].rank = equal ? out[i - 1].rank : static_cast<int32_t>(i);
  }
  return out;
}

// The token's, then those of the named ones, of which the token itself is one, the first if it was not named.
TokenLogprobs Sampler::named_logprobs(std::span<const float> raw, int32_t token,
                                      std::span<const int32_t> named, Scratch& scratch) const {
  TokenLogprobs out = logprobs(raw, token, named, scratch);
  if (std::ranges::find(named, token) == named.end()) out.insert(out.begin(), out[0]);
  return out;
}

// The token's, then the others' in their order. A rank counts the tokens that are strictly more likely.
TokenLogprobs Sampler::logprobs(std::span<const float> raw, int32_t token, std::span<const int32_t> others,
                                Scratch& scratch) const {
  const double log_sum = log_sum_exp(raw, scratch);
  const auto logprob = [&](int32_t t) {
    check(t >= 0 && static_cast<size_t>(t) < raw.size(), "log-probabilities are of tokens of the vocabulary");
    return static_cast<float>(raw[static_cast<size_t>(t)] - log_sum);
  };
  TokenLogprobs out;
  out.reserve(1 + others.size());
  out.push_back({token, logprob(token), 0});
  const float chosen = raw[static_cast<size_t>(token)];
  out[0].rank =
      1 + static_cast<int32_t>(std::ranges::count_if(raw, [chosen](float x) { return x > chosen; }));
  for (const int32_t other : others) out.push_back({other, logprob(other), 0});
  return out;
}

}  // namespace engine
