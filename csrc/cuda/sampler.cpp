#include "cuda/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/random.h"
#include "cuda/parcel.h"

namespace engine::cuda {
namespace {

constexpr size_t kPieceBytes = size_t{1} << 18;  // from which on a piece is large enough
constexpr size_t kNumArrays = 5;                 // that are sent
constexpr const char* kOutside = "log-probabilities are of tokens of the vocabulary";

size_t mask_words(int vocab) {
  return (static_cast<size_t>(vocab) + 31) / 32;
}

// Gives where the mask begins.
int64_t add_mask(std::span<const uint32_t> mask, std::vector<uint32_t>& masks) {
  masks.insert(masks.end(), mask.begin(), mask.end());
  return static_cast<int64_t>(masks.size() - mask.size());
}

std::vector<uint32_t> mask_of(std::span<const int32_t> tokens, int vocab) {
  std::vector<uint32_t> mask(mask_words(vocab));
  for (const int32_t token : tokens) {
    check(token >= 0 && token < vocab, "allowed_token_ids: tokens of the vocabulary");
    mask[static_cast<size_t>(token / 32)] |= 1u << (token % 32);
  }
  return mask;
}

ChosenLogit chosen(const LogprobSums& sums) {
  const bool nothing = sums.greatest == -std::numeric_limits<float>::infinity();
  return {sums.token, sums.logit, sums.rank, nothing ? 0 : sums.greatest + std::log(sums.sum)};
}

std::vector<TokenLogit> found_for(const LogprobRow& row, std::span<const TokenLogit> found) {
  const int32_t count = row.num_top + row.end_named - row.first_named;
  const auto of_row = found.subspan(static_cast<size_t>(row.first_found), static_cast<size_t>(count));
  return {of_row.begin(), of_row.end()};
}

template <class T>
void fetch(std::vector<T>& host, const DeviceMemory& memory, size_t offset, cudaStream_t stream) {
  if (host.empty()) return;
  cuda_check(cudaMemcpyAsync(host.data(), at<T>(memory, offset), host.size() * sizeof(T),
                             cudaMemcpyDeviceToHost, stream),
             "a copy from the GPU");
}

}  // namespace

bool CudaSampler::Task::is_large() const {
  const size_t sent = draws.size() * sizeof(DrawRow) + masks.size() * sizeof(uint32_t) +
                      edits.size() * sizeof(LogitEdit) + wanted.size() * sizeof(LogprobRow) +
                      named.size() * sizeof(int32_t);
  return sent + num_found * sizeof(TokenLogit) >= kPieceBytes;
}

// The rows of a piece before its last are not large together, in what is sent or in what comes back: that is
// smaller, but for the logits that were found.
void CudaSampler::reserve(int vocab) {
  static_assert(sizeof(LogprobSums) + sizeof(int32_t) <= sizeof(LogprobRow) &&
                sizeof(float) <= sizeof(LogitEdit));
  const auto tokens = static_cast<size_t>(vocab), edits = kMostEditsPerToken * tokens;
  parcel_.reserve(kPieceBytes + sizeof(DrawRow) + 2 * mask_words(vocab) * sizeof(uint32_t) +
                  edits * sizeof(LogitEdit) + sizeof(LogprobRow) + tokens * sizeof(int32_t) +
                  kNumArrays * Parcel::kAlignment);
  results_.reserve(kPieceBytes + sizeof(LogprobSums) + sizeof(int32_t) + tokens * sizeof(TokenLogit) +
                   edits * sizeof(float));
}

void CudaSampler::sample(cudaStream_t stream, float* logits, int vocab, std::span<const SamplingRow> rows,
                         std::span<Sampled> out) {
  check(vocab > 0 && vocab <= kMostTokens, "sample: a vocabulary of at most 2^21 - 1 tokens");
  check(rows.size() == out.size(), "sample: one result per row");
  for (size_t first = 0, end = 0; first < rows.size(); first = end) {
    Task task;
    while (end < rows.size() && !task.is_large()) add_draw(rows[end++], vocab, task);
    const Findings findings =
        run(stream, logits + first * static_cast<size_t>(vocab), static_cast<int>(end - first), vocab, task);
    for (size_t i = first; i < end; ++i) out[i] = {findings.tokens[i - first], {}};
    for (size_t i = 0; i < task.wanted.size(); ++i) {
      const LogprobRow& row = task.wanted[i];
      const std::vector<TokenLogit> found = found_for(row, findings.found);
      out[first + static_cast<size_t>(row.row)].logprobs =
          row.first_named == row.end_named ? top_logprobs(chosen(findings.sums[i]), found)
                                           : named_logprobs(chosen(findings.sums[i]), found);
    }
  }
}

void CudaSampler::score(cudaStream_t stream, float* logits, int vocab, std::span<const ScoringRow> rows,
                        std::span<TokenLogprobs> out) {
  check(vocab > 0 && rows.size() == out.size(), "score: one result per row");
  for (size_t first = 0, end = 0; first < rows.size(); first = end) {
    Task task;
    while (end < rows.size() && !task.is_large()) add_score(rows[end++], vocab, task);
    const Findings findings =
        run(stream, logits + first * static_cast<size_t>(vocab), static_cast<int>(end - first), vocab, task);
    for (size_t i = first; i < end; ++i)
      out[i] =
          top_logprobs(chosen(findings.sums[i - first]), found_for(task.wanted[i - first], findings.found));
  }
}

void CudaSampler::add_score(const ScoringRow& row, int vocab, Task& task) {
  check(row.token >= 0 && row.token < vocab, kOutside);
  const int32_t num_top = std::min(row.num_logprobs, vocab);
  task.wanted.push_back({-1, static_cast<int32_t>(task.wanted.size()), row.token, num_top, 0, 0,
                         static_cast<int32_t>(task.num_found)});
  task.num_found += static_cast<size_t>(num_top);
}

void CudaSampler::add_draw(const SamplingRow& row, int vocab, Task& task) {
  const SamplingParams& params = *row.params;
  DrawRow draw{};
  draw.mask = row.mask == nullptr ? -1 : add_mask({row.mask, mask_words(vocab)}, task.masks);
  draw.allowed =
      params.allowed_token_ids.empty() ? -1 : add_mask(mask_of(params.allowed_token_ids, vocab), task.masks);
  const auto first_edit = static_cast<int64_t>(task.edits.size());
  const std::vector<LogitEdit>& edits = edits_.of(row, vocab);
  task.edits.insert(task.edits.end(), edits.begin(), edits.end());
  std::ranges::stable_sort(task.edits.begin() + first_edit, task.edits.end(), {}, &LogitEdit::token);
  draw.first_edit = static_cast<int32_t>(first_edit);
  draw.end_edit = static_cast<int32_t>(task.edits.size());
  draw.fallback = fallback_token(row, vocab);
  draw.greedy = params.temperature < kGreedyBelow;
  draw.factor = 1 / params.temperature;
  draw.min_p = params.min_p;
  draw.top_p = params.top_p;
  draw.top_k = params.top_k;
  draw.uniform = random_uniform(params.seed, row.position);
  task.draws.push_back(draw);
  if (params.num_logprobs < 0) return;

  const std::vector<int32_t>& named = params.logprob_token_ids;
  for (const int32_t token : named) check(token >= 0 && token < vocab, kOutside);
  const int32_t num_top = named.empty() ? std::min(params.num_logprobs, vocab) : 0;
  const auto first_named = static_cast<int32_t>(task.named.size());
  task.named.insert(task.named.end(), named.begin(), named.end());
  task.wanted.push_back({draw.mask, static_cast<int32_t>(task.draws.size()) - 1, -1, num_top, first_named,
                         static_cast<int32_t>(task.named.size()), static_cast<int32_t>(task.num_found)});
  task.num_found += static_cast<size_t>(num_top) + named.size();
}

CudaSampler::Findings CudaSampler::run(cudaStream_t stream, float* logits, int num_rows, int vocab,
                                       const Task& task) {
  Parcel parcel;
  const size_t draws = parcel.add(task.draws), masks = parcel.add(task.masks), edits = parcel.add(task.edits),
               wanted = parcel.add(task.wanted), named = parcel.add(task.named);
  parcel.send(parcel_, stream);
  Findings findings{std::vector<int32_t>(task.draws.size()), std::vector<LogprobSums>(task.wanted.size()),
                    std::vector<TokenLogit>(task.num_found)};
  const size_t sums = 0, found = task.wanted.size() * sizeof(LogprobSums),
               tokens = found + task.num_found * sizeof(TokenLogit),
               saved = tokens + static_cast<size_t>(num_rows) * sizeof(int32_t);
  results_.reserve(saved + task.edits.size() * sizeof(float));
  const SampleArrays arrays{logits,
                            num_rows,
                            vocab,
                            at<uint32_t>(parcel_, masks),
                            task.masks.size(),
                            at<LogitEdit>(parcel_, edits),
                            task.edits.size(),
                            at<float>(results_, saved),
                            at<int32_t>(results_, tokens)};
  if (!task.draws.empty()) draw_rows(stream, arrays, at<DrawRow>(parcel_, draws));
  find_logprobs(
      stream, arrays,
      {at<LogprobRow>(parcel_, wanted), static_cast<int>(task.wanted.size()), at<int32_t>(parcel_, named),
       task.named.size(), at<LogprobSums>(results_, sums), at<TokenLogit>(results_, found), task.num_found});
  fetch(findings.tokens, results_, tokens, stream);
  fetch(findings.sums, results_, sums, stream);
  fetch(findings.found, results_, found, stream);
  cuda_check(cudaStreamSynchronize(stream), "sampling");
  return findings;
}

}  // namespace engine::cuda
