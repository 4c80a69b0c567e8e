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

// What changes logits before anything is drawn, but for the penalties.
void apply_bias(std::span<float> logits, const SamplingRow& row) {
  const SamplingParams& params = *row.params;
  for (const auto& [token, bias] : params.logit_bias) {
    check(token >= 0 && static_cast<size_t>(token) < logits.size(),
          "logit_bias names tokens of the vocabulary");
    logits[static_cast<size_t>(token)] += bias;
  }
  const auto num_output = static_cast<int64_t>(row.tokens.size()) - row.num_prompt;
  if (num_output >= params.min_tokens) return;
  for (const int32_t token : params.stop_token_ids) {
    check(token >= 0 && static_cast<size_t>(token) < logits.size(),
          "stop_token_ids are tokens of the vocabulary");
    logits[static_cast<size_t>(token)] = kLowest;
  }
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
  if (params.num_logprobs >= 0) scratch.raw.assign(logits.begin(), logits.end());
  apply_bias(logits, row);
  penalize(logits, row, scratch.counts);
  out.token = draw(logits, row, scratch);
  out.logprobs.clear();
  if (params.num_logprobs >= 0) fill_logprobs(params, scratch, out);
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

// The chosen token's, then the greatest ones. A rank counts the tokens that are strictly more likely.
void Sampler::fill_logprobs(const SamplingParams& params, Scratch& scratch, Sampled& out) const {
  const std::span<const float> raw = scratch.raw;
  const double log_sum = log_sum_exp(raw, scratch);
  const auto logprob = [&](int32_t token) {
    return static_cast<float>(raw[static_cast<size_t>(token)] - log_sum);
  };
  const float chosen = raw[static_cast<size_t>(out.token)];
  const auto greater = std::count_if(raw.begin(), raw.end(), [chosen](float x) { return x > chosen; });
  out.logprobs.push_back({out.token, logprob(out.token), static_cast<int32_t>(greater) + 1});

  const size_t k = std::min(raw.size(), static_cast<size_t>(params.num_logprobs));
  find_greatest(raw, k, scratch.indices);
  std::sort(scratch.indices.begin(), scratch.indices.end(), Greater{raw.data()});
  int32_t rank = 1;
  for (size_t i = 0; i < k; ++i) {
    const auto token = static_cast<size_t>(scratch.indices[i]);
    if (i > 0 && raw[token] != raw[static_cast<size_t>(scratch.indices[i - 1])])
      rank = static_cast<int32_t>(i) + 1;
    out.logprobs.push_back({scratch.indices[i], logprob(scratch.indices[i]), rank});
  }
}

}  // namespace engine
