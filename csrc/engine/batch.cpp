#include "engine/batch.h"

#include <numeric>

namespace engine {
namespace {

void append(Batch& batch, const ScheduledSequence& scheduled) {
  const Sequence& sequence = *scheduled.sequence;
  const int32_t begin = sequence.num_computed, end = begin + scheduled.num_tokens;
  batch.sequences.push_back({.first_token = batch.num_tokens(),
                             .num_tokens = scheduled.num_tokens,
                             .num_computed = begin,
                             .first_block = static_cast<int32_t>(batch.block_tables.size())});
  batch.tokens.insert(batch.tokens.end(), sequence.tokens.begin() + begin, sequence.tokens.begin() + end);
  batch.positions.resize(batch.tokens.size());
  std::iota(batch.positions.end() - scheduled.num_tokens, batch.positions.end(), begin);
  const int32_t num_blocks = (end + kBlockSize - 1) / kBlockSize;
  batch.block_tables.insert(batch.block_tables.end(), sequence.blocks.begin(),
                            sequence.blocks.begin() + num_blocks);
  const PromptRange scored = scored_range(scheduled);
  for (int32_t i = scored.first; i < scored.last; ++i) {
    batch.scoring_rows.push_back(batch.sequences.back().first_token + i - begin);
    batch.scoring.push_back({.token = sequence.tokens[static_cast<size_t>(i) + 1],
                             .num_logprobs = sequence.params.num_prompt_logprobs});
  }
  const PromptRange pooled = pooled_range(scheduled);
  for (int32_t i = pooled.first; i < pooled.last; ++i)
    batch.pooling_rows.push_back(batch.sequences.back().first_token + i - begin);
  if (!samples(scheduled)) return;
  batch.logit_rows.push_back(batch.num_tokens() - 1);
  batch.sampling.push_back({.params = &sequence.params,
                            .tokens = sequence.tokens,
                            .num_prompt = sequence.num_prompt,
                            .position = sequence.tokens.size()});
}

}  // namespace

Batch make_batch(const Step& step) {
  Batch batch;
  for (const ScheduledSequence& scheduled : step) append(batch, scheduled);
  return batch;
}

}  // namespace engine
