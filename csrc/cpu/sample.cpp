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
constexpr const char* kOutside = "log-probabilities are of tokens of the vocabulary";

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

void apply_mask(std::span<float> logits, const uint32_t* mask) {
  for (size_t begin = 0; begin < logits.size(); begin += 32) {
    const uint32_t word = mask[begin / 32];
    if (word == ~0u) continue;
    const size_t end = std::min(begin + 32, logits.size());
    for (size_t i = begin; i < end; ++i)
      if (!allows(mask, static_cast<int32_t>(i))) logits[i] = kLowest;
  }
}

void apply_edits(std::span<const LogitEdit> edits, std::span<float> logits) {
  for (const LogitEdit& edit : edits) {
    float& x = logits[static_cast<size_t>(edit.token)];
    x = !edit.penalty ? x + edit.value : x > 0 ? x / edit.value : x * edit.value;
  }
}

std::vector<TokenLogit> logits_of(std::span<const int32_t> tokens, std::span<const float> raw) {
  std::vector<TokenLogit> out;
  out.reserve(tokens.size());
  for (const int32_t token : tokens) {
    check(token >= 0 && static_cast<size_t>(token) < raw.size(), kOutside);
    out.push_back({token, raw[static_cast<size_t>(token)]});
  }
  return out;
}

std::vector<TokenLogit> greatest_logits(std::span<const float> raw, int32_t num_top,
                                        std::vector<int32_t>& indices) {
  find_greatest(raw, std::min(raw.size(), static_cast<size_t>(num_top)), indices);
  return logits_of(indices, raw);
}

// A weight, which is at most 1, as an integer. The sum of a vocabulary's fits 63 bits; what is lost, of
// weights below 2^-18, is less than 2^-42 of the most likely token's.
int64_t mass(float weight) {
  return static_cast<int64_t>(weight * 0x1p42f);
}

int32_t argmax(std::span<const float> logits, float greatest) {
  const auto found = std::find(logits.begin(), logits.end(), greatest);
  return found == logits.end() ? 0 : static_cast<int32_t>(found - logits.begin());
}

}  // namespace

void Sampler::sample(float* logits, int vocab, std::span<const SamplingRow> rows, std::span<Sampled> out) {
  check(vocab > 0 && vocab <= kMostTokens, "sample: a vocabulary of at most 2^21 - 1 tokens");
  check(rows.size() == out.size(), "sample: one result per row");
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
  apply_edits(scratch.edits.of(row, static_cast<int32_t>(logits.size())), logits);
  out.token = draw(logits, row, scratch);
  out.logprobs.clear();
  if (params.num_logprobs < 0) return;
  const ChosenLogit chosen = this->chosen(scratch.raw, out.token, scratch);
  if (params.logprob_token_ids.empty())
    out.logprobs = top_logprobs(chosen, greatest_logits(scratch.raw, params.num_logprobs, scratch.indices));
  else
    out.logprobs = named_logprobs(chosen, logits_of(params.logprob_token_ids, scratch.raw));
}

void Sampler::score(float* logits, int vocab, std::span<const ScoringRow> rows,
                    std::span<TokenLogprobs> out) {
  check(vocab > 0 && rows.size() == out.size(), "score: one result per row");
  scratch_.resize(static_cast<size_t>(pool_.size()));
  pool_.run(static_cast<int>(rows.size()), [&](int row, int worker) {
    const auto i = static_cast<size_t>(row), width = static_cast<size_t>(vocab);
    const std::span<float> raw(logits + i * width, width);
    make_comparable(raw);
    Scratch& scratch = scratch_[static_cast<size_t>(worker)];
    out[i] = top_logprobs(chosen(raw, rows[i].token, scratch),
                          greatest_logits(raw, rows[i].num_logprobs, scratch.indices));
  });
}

// Only the allowed tokens keep their logits.
void Sampler::restrict(std::span<float> logits, const SamplingRow& row, std::vector<float>& allowed) {
  const std::vector<int32_t>& tokens = row.params->allowed_token_ids;
  if (tokens.empty()) return;
  allowed.clear();
  for (const int32_t token : tokens) {
    check(token >= 0 && static_cast<size_t>(token) < logits.size(),
          "allowed_token_ids: tokens of the vocabulary");
    allowed.push_back(logits[static_cast<size_t>(token)]);
  }
  std::ranges::fill(logits, kLowest);
  for (size_t i = 0; i < tokens.size(); ++i) logits[static_cast<size_t>(tokens[i])] = allowed[i];
}

int32_t Sampler::draw(std::span<float> logits, const SamplingRow& row, Scratch& scratch) const {
  make_comparable(logits);
  const SamplingParams& params = *row.params;
  const float greatest = kernels_.max(logits.data(), logits.size());
  if (greatest == kLowest) return fallback_token(row, static_cast<int32_t>(logits.size()));
  if (params.temperature < kGreedyBelow) return argmax(logits, greatest);
  collect(logits, params, scratch);
  if (params.top_p < 1) keep_top_p(params.top_p, scratch);

  const int64_t total = total_mass(scratch.candidates);
  const double u = random_uniform(params.seed, row.position);
  int64_t left = std::min(static_cast<int64_t>(u * static_cast<double>(total)), total - 1);
  const auto found = std::ranges::find_if(
      scratch.candidates, [&](const Candidate& candidate) { return (left -= mass(candidate.weight)) < 0; });
  return found->token;
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

int64_t Sampler::total_mass(std::span<const Candidate> candidates) {
  int64_t total = 0;
  for (const Candidate& candidate : candidates) total += mass(candidate.weight);
  return total;
}

// Keeps the heaviest candidates, up to and with the one that reaches top_p of their mass; the order of
// Greater decides between equals. Halves the range in which the last one kept lies, in linear time: nothing
// is sorted.
void Sampler::keep_top_p(float top_p, Scratch& scratch) {
  const auto heavier = [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
  };
  const int64_t total = total_mass(scratch.candidates);
  // What the candidates before `begin` leave of the mass to be kept.
  int64_t missing =
      std::clamp(static_cast<int64_t>(std::ceil(top_p * static_cast<double>(total))), int64_t{1}, total);
  // Those lighter than this have together less than what is not kept.
  const int64_t light = (total - missing) / static_cast<int64_t>(scratch.candidates.size());
  std::erase_if(scratch.candidates,
                [&](const Candidate& candidate) { return mass(candidate.weight) < light; });

  scratch.ordered = scratch.candidates;
  auto begin = scratch.ordered.begin(), end = scratch.ordered.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, heavier);
    const int64_t upper = total_mass({begin, middle});
    if (upper >= missing) {
      end = middle;
    } else {
      missing -= upper;
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

ChosenLogit Sampler::chosen(std::span<const float> raw, int32_t token, Scratch& scratch) const {
  check(token >= 0 && static_cast<size_t>(token) < raw.size(), kOutside);
  const float logit = raw[static_cast<size_t>(token)];
  const auto greater = std::ranges::count_if(raw, [logit](float x) { return x > logit; });
  return {token, logit, 1 + static_cast<int32_t>(greater), log_sum_exp(raw, scratch)};
}

}  // namespace engine
