// Drawing tokens and finding log-probabilities, by one block of threads for each row of logits. It draws what
// cpu/sample.cpp draws, bit for bit: weights are the same f32 numbers there, and are added up as the same
// integers, whatever the order.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "device/edits.h"
#include "device/logprobs.h"

namespace engine::cuda {

// One row of logits to draw from.
struct DrawRow {
  int64_t mask, allowed;  // where the bit masks of its constraint and of allowed_token_ids begin; -1: none
  int32_t first_edit, end_edit;
  int32_t fallback;  // the token if every logit is -inf
  bool greedy;
  float factor;  // 1 / temperature
  float min_p, top_p;
  int32_t top_k;   // 0: all
  double uniform;  // in [0, 1)
};

// One row of logits whose log-probabilities are wanted.
struct LogprobRow {
  int64_t mask;
  int32_t row;                     // of the logits
  int32_t token;                   // -1: the one drawn from that row
  int32_t num_top;                 // the greatest logits that are wanted, at most vocab; 0 with named ones
  int32_t first_named, end_named;  // tokens whose logits are wanted
  int32_t first_found;             // where they go
};

struct LogprobSums {
  int32_t token;
  int32_t rank;
  float logit;
  float greatest;
  double sum;  // Σ e^(logit - greatest)
};

// Arrays in the device's memory.
struct SampleArrays {
  float* logits;  // (num_rows, vocab)
  int num_rows, vocab;
  const uint32_t* masks;
  size_t num_mask_words;
  const LogitEdit* edits;  // of each row in ascending order of tokens
  size_t num_edits;
  float* saved;     // (num_edits): logits before they were edited
  int32_t* tokens;  // (num_rows)
};

// tokens[i] is drawn from row i. The logits are the same afterwards.
void draw_rows(cudaStream_t stream, const SampleArrays& arrays, const DrawRow* rows);

struct LogprobArrays {
  const LogprobRow* rows;
  int num_rows;
  const int32_t* named;
  size_t num_named;
  LogprobSums* sums;  // (num_rows)
  TokenLogit* found;  // the greatest ones in no order, or the named ones in theirs
  size_t num_found;
};

void find_logprobs(cudaStream_t stream, const SampleArrays& arrays, const LogprobArrays& wanted);

}  // namespace engine::cuda
