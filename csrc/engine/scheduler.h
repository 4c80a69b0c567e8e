// Which tokens of which sequences run in the next step. One rule: every sequence's num_computed catches up
// with its size, in order, within the step's token budget. Chunked prefill, prefix-cache hits and
// preemption by recompute follow from it.
//
// A step takes as long as it has tokens, so while answers run, those that read a prompt share a budget in
// proportion to the number of answers: nobody's answer stalls for the length of another one's prompt. But in
// a burst the majority decides: while more wait for a first token than for the next, prompts get whole steps.
//
// Lower priority numbers come first, and first come, first served among equals: running_ and waiting_ are
// each in that order, and what is preempted is the last that runs. Only where all priorities are equal is
// running_ followed by waiting_ that order too: nobody who waits takes a place from one who runs.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/block_pool.h"
#include "engine/request.h"
#include "engine/sequence.h"

namespace engine {

struct SchedulerOptions {
  int32_t num_blocks = 0;
  int32_t max_num_seqs = 256;
  int32_t max_num_batched_tokens = 512;
  bool enable_prefix_caching = true;
  int32_t max_cached_blocks = INT32_MAX;  // see BlockPool
};

struct ScheduledSequence {
  Sequence* sequence;
  int32_t num_tokens;  // tokens [num_computed, num_computed + num_tokens) run in this step
};

using Step = std::vector<ScheduledSequence>;

// True when the step runs the sequence's last token.
inline bool catches_up(const ScheduledSequence& scheduled) {
  return scheduled.sequence->num_computed + scheduled.num_tokens == scheduled.sequence->size();
}

// True when its next token is sampled then; one that pools is at its end instead.
inline bool samples(const ScheduledSequence& scheduled) {
  return catches_up(scheduled) && !scheduled.sequence->pools();
}

struct PromptRange {  // tokens [first, last) of a sequence, all of the step
  int32_t first, last;
  int32_t size() const { return last - first; }
};
// Those whose logits score the prompt token that follows.
PromptRange scored_range(const ScheduledSequence& scheduled);
// Those whose states the sequence's vector is made of. In order and once each, whatever the steps are and
// however often it is preempted, so that their sum is always the same.
PromptRange pooled_range(const ScheduledSequence& scheduled);

// schedule() and commit() alternate; submit() and cancel() come between a commit and the next schedule.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);

  // The request must have passed validate(); a second live request of the same id is an InvariantError.
  void submit(Request request);
  // The ABORT event; nothing for unknown ids: the request may have finished meanwhile.
  std::optional<Event> cancel(uint64_t id);
  bool busy() const { return !sequences_.empty(); }

  // Never empty while busy(). A full block can be shared from here on, not from commit() on:
  // within a step the keys and values of a layer are all stored before attention reads any.
  Step schedule(double now);
  // Takes one sampled token for each sequence that samples in this step and the log-probabilities of what was
  // scored (both in step order), finishes what is finished, and returns what happened. The states of
  // pooled_range() must have been added to the sequences.
  std::vector<Event> commit(const Step& step, std::span<Sampled> sampled, std::span<TokenLogprobs> scored,
                            double now);
  // Ends everything with ERROR, even in the middle of a step; used when the engine cannot go on.
  std::vector<Event> fail_all();

  void forget_prefixes();         // of requests that have ended
  void fill(Stats& stats) const;  // all but alive and error
  void check_integrity() const;

 private:
  struct Budget {
    int32_t tokens;   // of the step
    int32_t prompts;  // of them for sequences that are more than one token behind
  };
  Budget budget() const;
  void schedule_running(Step& step, Budget& budget);
  void admit_waiting(Step& step, Budget& budget, double now);
  void run(Sequence& sequence, Step& step, Budget& budget);
  bool reserve(
      Sequence& sequence);  // a block for each of its tokens; false when that took its own preemption
  bool reserve_at_admission(Sequence& sequence);
  void find_cached_prefix(Sequence& sequence);
  void publish_full_blocks(Sequence& sequence, int32_t num_tokens);
  void preempt_last();
  void release(Sequence& sequence);
  std::span<TokenLogprobs> take_scored(const ScheduledSequence& scheduled, std::span<TokenLogprobs> scored);
  Event append(Sequence& sequence, Sampled sampled, double now);
  Event pool(Sequence& sequence, double now);
  void remove_finished();

  SchedulerOptions options_;
  BlockPool pool_;
  std::unordered_map<uint64_t, std::unique_ptr<Sequence>> sequences_;
  std::deque<Sequence*> waiting_;   // first to run first; preempted ones return to their place
  std::vector<Sequence*> running_;  // likewise
  Stats stats_;                     // what fill() cannot count from the above
};

}  // namespace engine
