// What goes into the engine and what comes out of it.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "base/quant.h"
#include "device/batch.h"

namespace engine {

struct Request {
  uint64_t id = 0;
  std::vector<int32_t> prompt;  // at least one token
  SamplingParams params;
};

// Throws std::invalid_argument naming the parameter, its value and what is allowed, unless the request can
// run to its end. `cache_tokens` is what the whole key/value cache holds.
void validate(const Request& request, int32_t vocab_size, int32_t max_model_len, int64_t cache_tokens);

enum class Finish : uint8_t { NONE, STOP, LENGTH, ABORT, ERROR, REPETITION };

// What one step did for one request. Times are seconds of a steady clock.
struct Event {
  uint64_t request_id = 0;
  std::vector<int32_t> tokens;          // new ones; none in an ABORT or ERROR event, or where max_tokens is 0
  std::vector<TokenLogprobs> logprobs;  // one entry per token when asked for, else empty
  std::vector<TokenLogprobs> prompt_logprobs;  // of all prompt tokens but the first; in the first event
  std::vector<float> embedding;                // (hidden_size) of a pooling request, in its only event
  Finish finish = Finish::NONE;
  std::string error;              // for ERROR: why, where it is this request's own fault
  int32_t num_cached_tokens = 0;  // of the prompt, found in the prefix cache
  double scheduled_time = 0;      // when the request first ran
  double time = 0;                // when the step ended; for ABORT and ERROR, the last one that did
  bool wakes = true;              // who reads; otherwise it waits for one that does
};

struct EngineOptions {
  std::string device = "cpu";
  int32_t num_threads = 0;   // 0: one per core
  int64_t memory_bytes = 0;  // weights, cache and activations; 0: half of what is available, or on a GPU:
  double gpu_memory_utilization = 0.9;  // this part of what is free
  int32_t max_model_len = 0;  // tokens of prompt and answer; 0: what the cache holds, at most max_position
  int32_t max_position = 0;   // the model's own limit
  int32_t max_num_seqs = 256;
  int32_t max_num_batched_tokens = 512;
  Format kv_format = Format::F16;
  // "" keeps each tensor's own; F32, F16, BF16, INT8 (per channel) or INT4 (see load_weights) converts the
  // plain-float ones.
  std::string weight_format;
  bool exact = false;          // do not round activations for the multiply (Arithmetic in device/device.h)
  bool enforce_eager = false;  // launch every step anew, none as a CUDA graph; a CPU has none
  bool enable_prefix_caching = true;
};

struct Stats {
  int32_t block_size = kBlockSize;  // tokens
  int32_t num_running = 0, num_waiting = 0;
  int32_t num_blocks = 0, num_free_blocks = 0;
  int64_t num_steps = 0, num_preemptions = 0;
  int64_t prefix_cache_queries = 0, prefix_cache_hits = 0;  // tokens
  int64_t prompt_tokens = 0, generation_tokens = 0;
  int64_t step_tokens = 0;                  // of all steps
  std::array<int64_t, 32> steps_by_size{};  // [k]: steps of more than 2^(k-1) and at most 2^k tokens
  double last_step_time = 0;                // steady clock, the heartbeat
  bool alive = true;
  std::string error;  // why the engine stopped
};

}  // namespace engine
