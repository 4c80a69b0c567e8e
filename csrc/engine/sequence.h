// One request on its way through the engine. Owned by the engine thread.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "engine/block_pool.h"
#include "engine/request.h"

namespace engine {

struct Sequence {
  explicit Sequence(Request request)
      : id(request.id),
        tokens(std::move(request.prompt)),
        num_prompt(static_cast<int32_t>(tokens.size())),
        params(std::move(request.params)),
        repeats(static_cast<size_t>(params.repetition_detection.max_pattern_size)),
        num_told(num_prompt) {}

  uint64_t id;
  std::vector<int32_t> tokens;  // prompt, then what was generated
  int32_t num_prompt;
  SamplingParams params;
  int32_t num_computed = 0;        // tokens whose keys and values are in the cache; catches up with size()
  std::vector<int32_t> blocks;     // block table: ids in the pool, enough for all tokens while it runs
  int32_t num_published = 0;       // leading blocks that others can find, or whose twins they can
  PrefixId root = kEmptyPrefix;    // of all its prefixes: its salt
  PrefixId prefix = kEmptyPrefix;  // the tokens of those blocks
  int32_t num_cached = 0;          // prompt tokens found in the prefix cache at first admission
  bool admitted = false;           // has run at least once
  double scheduled_time = 0;       // when it first ran
  std::vector<TokenLogprobs> prompt_logprobs;  // of those asked for, in the order of the prompt, until sent
  int32_t num_scored = 0;                      // how many there were
  std::vector<double> pooled;                  // (hidden_size): sum of the states that make up its vector
  int32_t num_pooled = 0;                      // leading prompt tokens whose states are in the sum
  std::vector<int32_t> repeats;  // [k]: output tokens up to the last one that equal the one k + 1 before
  Finish finish = Finish::NONE;
  // Of a constrained one (engine/masks.h):
  int32_t num_told = 0;         // tokens that its constraint knows
  std::vector<int32_t> forced;  // tokens that must come next, not appended yet
  std::string error;            // why its constraint cannot go on

  int32_t size() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_output() const { return size() - num_prompt; }
  // Prompt tokens that need a row of logits, for the log-probability of the token that follows.
  int32_t num_to_score() const { return params.num_prompt_logprobs < 0 ? 0 : num_prompt - 1; }
  bool pools() const { return params.pooling != Pooling::NONE; }
  // The first token that must be computed even if its keys and values are cached: logits or a state of it are
  // still wanted. The last one's always are.
  int32_t first_wanted() const {
    if (num_scored < num_to_score()) return num_scored;
    return params.pooling == Pooling::MEAN ? num_pooled : size() - 1;
  }
};

}  // namespace engine
