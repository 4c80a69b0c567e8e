// One step's work, built whole by make_batch() and const from then on.
#pragma once

#include <cstdint>
#include <vector>

#include "device/sampling.h"

namespace engine {

inline constexpr int kBlockSize = 16;  // tokens in a block of the key/value cache

// A run of consecutive tokens of one sequence. There are no phases: a decode step is a run of one token.
struct BatchSequence {
  int32_t first_token;   // index of its first token in Batch::tokens
  int32_t num_tokens;    // tokens of it in this batch, at least 1
  int32_t num_computed;  // tokens whose keys and values are in the cache already; position of its first token
                         // here
  int32_t first_block;   // index of its block table in Batch::block_tables
};

struct Batch {
  std::vector<int32_t> tokens;           // (num_tokens)
  std::vector<int32_t> positions;        // (num_tokens)
  std::vector<BatchSequence> sequences;  // (num_sequences)
  std::vector<int32_t>
      block_tables;  // concatenated; ceil((num_computed + num_tokens) / kBlockSize) per sequence
  std::vector<int32_t> logit_rows;    // (num_logits): indices into tokens
  std::vector<SamplingRow> sampling;  // (num_logits)
  std::vector<int32_t> scoring_rows;  // (num_scored): indices into tokens
  std::vector<ScoringRow> scoring;    // (num_scored)
  std::vector<int32_t> pooling_rows;  // (num_pooled): indices into tokens

  int num_tokens() const { return static_cast<int>(tokens.size()); }
  int num_logits() const { return static_cast<int>(logit_rows.size()); }
};

// Throws where sequences and block tables contradict each other. Returns the largest block that is named, or
// -1.
int32_t check_tables(const Batch& batch);

}  // namespace engine
