#include "engine/scheduler.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <numeric>
#include <utility>

#include "base/check.h"

namespace engine {

namespace {

int32_t blocks_for(int64_t num_tokens) {
  return static_cast<int32_t>((num_tokens + kBlockSize - 1) / kBlockSize);
}

// What prompts get in a step beside running answers: with eight tokens for each, a step that reads prompts
// takes a few times as long as one that does not, and as long again as others read theirs in the meantime;
// fewer than 64 would waste the weights that a step reads (benchmarks/LOG.md).
constexpr int32_t kPromptTokensPerAnswer = 8, kLeastPromptTokens = 64;

// More prompts than this are a burst. Fewer, read together, would end and come back together.
constexpr int32_t kBurst = 8;

int32_t behind(const Sequence& sequence) {
  return sequence.size() - sequence.num_computed;
}

BlockKey key_of_block(const Sequence& sequence, int32_t index, PrefixId prefix) {
  BlockKey key{.prefix = prefix};
  std::copy_n(sequence.tokens.begin() + index * kBlockSize, kBlockSize, key.tokens.begin());
  return key;
}

bool comes_before(const Sequence* a, const Sequence* b) {
  return std::pair(a->params.priority, a->id) < std::pair(b->params.priority, b->id);
}

template <class Sequences>
void insert_in_order(Sequences& sequences, Sequence* sequence) {
  sequences.insert(std::ranges::upper_bound(sequences, sequence, comes_before), sequence);
}

// Counts the last output token in, and says whether it completes a repetition: a pattern of k tokens stands
// there n times in a row when the last (n - 1) * k tokens equal those k before them.
bool completes_repetition(Sequence& sequence) {
  const RepetitionDetection& wanted = sequence.params.repetition_detection;
  const auto last = sequence.tokens.size() - 1;
  bool found = false;
  for (int32_t size = wanted.min_pattern_size; size <= wanted.max_pattern_size; ++size) {
    if (size >= sequence.num_output()) break;
    int32_t& repeats = sequence.repeats[static_cast<size_t>(size) - 1];
    repeats = sequence.tokens[last] == sequence.tokens[last - static_cast<size_t>(size)] ? repeats + 1 : 0;
    found |= repeats >= int64_t{size} * (wanted.min_count - 1);
  }
  return found;
}

// The sampler masks stop tokens until min_tokens are out; one comes through only where nothing else is left,
// which for a constrained sequence means that its answer is complete.
Finish finish_reason(Sequence& sequence) {
  const SamplingParams& params = sequence.params;
  const bool repeats = completes_repetition(sequence);
  const bool may_end = sequence.num_output() > params.min_tokens;
  if ((may_end || params.constrained) &&
      std::ranges::find(params.stop_token_ids, sequence.tokens.back()) != params.stop_token_ids.end())
    return Finish::STOP;
  if (sequence.num_output() >= params.max_tokens) return Finish::LENGTH;
  return may_end && repeats ? Finish::REPETITION : Finish::NONE;
}

void append_token(Sequence& sequence, int32_t token) {
  sequence.tokens.push_back(token);
  sequence.finish = finish_reason(sequence);
}

// All at once, without a forward for each; one by one where each needs its log-probabilities.
void append_forced(Sequence& sequence) {
  std::vector<int32_t>& forced = sequence.forced;
  const size_t most = sequence.params.num_logprobs < 0 ? forced.size() : 1;
  size_t n = 0;
  while (n < most && sequence.finish == Finish::NONE) append_token(sequence, forced[n++]);
  forced.erase(forced.begin(), forced.begin() + static_cast<int64_t>(n));
}

Event make_event(const Sequence& sequence, Finish finish, double now) {
  Event event;
  event.request_id = sequence.id;
  event.finish = finish;
  event.num_cached_tokens = sequence.num_cached;
  event.scheduled_time = sequence.scheduled_time;
  event.time = now;
  return event;
}

}  // namespace

PromptRange scored_range(const ScheduledSequence& scheduled) {
  const Sequence& sequence = *scheduled.sequence;
  const int32_t begin = sequence.num_computed, end = begin + scheduled.num_tokens;
  const int32_t first = std::max(begin, sequence.num_scored);
  return {first, std::max(first, std::min(end, sequence.num_to_score()))};
}

PromptRange pooled_range(const ScheduledSequence& scheduled) {
  const Sequence& sequence = *scheduled.sequence;
  const int32_t begin = sequence.num_computed, end = begin + scheduled.num_tokens;
  if (!sequence.pools()) return {end, end};
  const bool all = sequence.params.pooling == Pooling::MEAN;
  const int32_t first = std::max(begin, all ? sequence.num_pooled : sequence.num_prompt - 1);
  return {first, std::max(first, end)};
}

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options), pool_(options.num_blocks, options.max_cached_blocks) {
  check(options.max_num_seqs > 0 && options.max_num_batched_tokens > 0, "a step must have room for a token");
}

void Scheduler::submit(Request request) {
  check(!request.prompt.empty(), "an empty prompt");
  check(blocks_for(int64_t(request.prompt.size()) + request.params.max_tokens) <= pool_.num_blocks(),
        "a request that the whole cache cannot hold");
  const uint64_t id = request.id;
  const auto [entry, inserted] = sequences_.try_emplace(id);
  check(inserted, "request id " + std::to_string(id) + " is in use");
  entry->second = std::make_unique<Sequence>(std::move(request));
  Sequence& sequence = *entry->second;
  sequence.root = pool_.root(sequence.params.cache_salt);
  insert_in_order(waiting_, &sequence);
}

std::optional<Event> Scheduler::cancel(uint64_t id) {
  const auto entry = sequences_.find(id);
  if (entry == sequences_.end()) return std::nullopt;
  Sequence& sequence = *entry->second;
  if (std::erase(running_, &sequence) == 0) std::erase(waiting_, &sequence);
  release(sequence);
  const Event event = make_event(sequence, Finish::ABORT, stats_.last_step_time);
  sequences_.erase(entry);
  return event;
}

Step Scheduler::schedule(double now) {
  Step step;
  step.reserve(running_.size() + 1);
  Budget left = budget();
  schedule_running(step, left);
  admit_waiting(step, left, now);
  check(!busy() || !step.empty(), "a step without tokens");
  return step;
}

Scheduler::Budget Scheduler::budget() const {
  const int32_t tokens = options_.max_num_batched_tokens;
  const auto answers = static_cast<int32_t>(
      std::ranges::count_if(running_, [](const Sequence* sequence) { return behind(*sequence) == 1; }));
  const auto admissible = std::min(sequences_.size(), size_t(options_.max_num_seqs));
  const int32_t prompts = static_cast<int32_t>(admissible) - answers;
  const bool burst = prompts > std::max(answers, kBurst);
  const int32_t share =
      answers == 0 || burst ? tokens : std::max(kLeastPromptTokens, kPromptTokensPerAnswer * answers);
  return {tokens, std::max(1, std::min(share, tokens - answers))};
}

// Preemption takes from the back and never reaches behind i, so what is in the step already stays there.
void Scheduler::schedule_running(Step& step, Budget& budget) {
  for (size_t i = 0; i < running_.size() && budget.tokens > 0; ++i) {
    Sequence& sequence = *running_[i];
    if (reserve(sequence)) run(sequence, step, budget);
  }
}

void Scheduler::admit_waiting(Step& step, Budget& budget, double now) {
  while (budget.tokens > 0 && budget.prompts > 0 && !waiting_.empty() &&
         running_.size() < size_t(options_.max_num_seqs)) {
    Sequence& sequence = *waiting_.front();
    if (!reserve_at_admission(sequence)) return;
    waiting_.pop_front();
    insert_in_order(running_, &sequence);
    if (!std::exchange(sequence.admitted, true)) {
      sequence.num_cached = sequence.num_computed;
      sequence.scheduled_time = now;
      stats_.prefix_cache_queries += options_.enable_prefix_caching ? sequence.num_prompt : 0;
      stats_.prefix_cache_hits += sequence.num_cached;
    }
    run(sequence, step, budget);
  }
}

void Scheduler::run(Sequence& sequence, Step& step, Budget& budget) {
  int32_t num_tokens = std::min(behind(sequence), budget.tokens);
  if (behind(sequence) > 1) {
    num_tokens = std::min(num_tokens, budget.prompts);
    budget.prompts -= num_tokens;
  }
  if (num_tokens == 0) return;
  budget.tokens -= num_tokens;
  publish_full_blocks(sequence, num_tokens);
  step.push_back({&sequence, num_tokens});
}

bool Scheduler::reserve(Sequence& sequence) {
  while (sequence.blocks.size() < size_t(blocks_for(sequence.size()))) {
    const int32_t block = pool_.allocate();
    if (block >= 0) {
      sequence.blocks.push_back(block);
      continue;
    }
    const bool itself = running_.back() == &sequence;
    preempt_last();
    if (itself) return false;
  }
  return true;
}

// All blocks at once, and only if that leaves every running sequence room for one more: else the newcomer
// would soon be preempted again, or take what an earlier one was admitted for. Alone it always fits.
bool Scheduler::reserve_at_admission(Sequence& sequence) {
  const auto room = static_cast<int32_t>(running_.size());
  if (pool_.num_free() <= room) return false;  // at least one block is always new
  find_cached_prefix(sequence);
  std::vector<int32_t>& blocks = sequence.blocks;
  const auto taken = std::ranges::count_if(blocks, [this](int32_t block) { return pool_.is_free(block); });
  const int32_t num_new = blocks_for(sequence.size()) - static_cast<int32_t>(blocks.size());
  if (taken + num_new + room > pool_.num_free()) {
    blocks.clear();  // found, not yet acquired
    return false;
  }
  sequence.num_published = static_cast<int32_t>(blocks.size());
  sequence.num_computed = sequence.num_published * kBlockSize;
  for (int32_t block : blocks) pool_.acquire(block);
  for (int32_t i = 0; i < num_new; ++i) blocks.push_back(pool_.allocate());
  return true;
}

// Fills the block table with the cached blocks of the sequence's prefix, without references. What is still
// wanted of tokens is left to compute.
void Scheduler::find_cached_prefix(Sequence& sequence) {
  sequence.prefix = sequence.root;
  const int32_t limit = options_.enable_prefix_caching ? sequence.first_wanted() / kBlockSize : 0;
  for (int32_t i = 0; i < limit; ++i) {
    const int32_t block = pool_.find(key_of_block(sequence, i, sequence.prefix));
    if (block < 0) break;
    sequence.blocks.push_back(block);
    sequence.prefix = pool_.prefix(block);
  }
}

void Scheduler::publish_full_blocks(Sequence& sequence, int32_t num_tokens) {
  if (!options_.enable_prefix_caching) return;
  const int32_t num_full = (sequence.num_computed + num_tokens) / kBlockSize;
  for (int32_t& i = sequence.num_published; i < num_full; ++i)
    sequence.prefix = pool_.publish(sequence.blocks[i], key_of_block(sequence, i, sequence.prefix));
}

void Scheduler::preempt_last() {
  Sequence& sequence = *running_.back();
  release(sequence);
  running_.pop_back();
  insert_in_order(waiting_, &sequence);
  ++stats_.num_preemptions;
}

// Last block first, so that a prefix is evicted from its tail: a head without its tail can be used, not the
// reverse.
void Scheduler::release(Sequence& sequence) {
  for (; !sequence.blocks.empty(); sequence.blocks.pop_back()) pool_.release(sequence.blocks.back());
  sequence.num_computed = 0;
}

std::vector<Event> Scheduler::commit(const Step& step, std::span<Sampled> sampled,
                                     std::span<TokenLogprobs> scored, double now) {
  std::vector<Event> events;
  events.reserve(step.size());
  for (const ScheduledSequence& scheduled : step) {
    Sequence& sequence = *scheduled.sequence;
    const bool sampling = samples(scheduled), ends = catches_up(scheduled) && !sampling;
    scored = take_scored(scheduled, scored);
    if (pooled_range(scheduled).size() > 0) sequence.num_pooled = pooled_range(scheduled).last;
    sequence.num_computed += scheduled.num_tokens;
    if (ends) events.push_back(pool(sequence, now));
    if (!sampling) continue;
    check(!sampled.empty(), "fewer tokens sampled than sequences that sample");
    events.push_back(append(sequence, std::move(sampled.front()), now));
    sampled = sampled.subspan(1);
  }
  check(sampled.empty(), "more tokens sampled than sequences that sample");
  check(scored.empty(), "more tokens scored than asked for");
  remove_finished();
  ++stats_.num_steps;
  const auto size = std::accumulate(
      step.begin(), step.end(), uint32_t{0},
      [](uint32_t sum, const auto& scheduled) { return sum + static_cast<uint32_t>(scheduled.num_tokens); });
  stats_.step_tokens += size;
  ++stats_.steps_by_size[static_cast<size_t>(std::bit_width(size - 1))];
  stats_.last_step_time = now;
  return events;
}

// Moves what was scored of the sequence out of the front of `scored`, and returns the rest.
std::span<TokenLogprobs> Scheduler::take_scored(const ScheduledSequence& scheduled,
                                                std::span<TokenLogprobs> scored) {
  const auto count = static_cast<size_t>(scored_range(scheduled).size());
  check(count <= scored.size(), "fewer tokens scored than asked for");
  Sequence& sequence = *scheduled.sequence;
  std::ranges::move(scored.first(count), std::back_inserter(sequence.prompt_logprobs));
  sequence.num_scored += static_cast<int32_t>(count);
  return scored.subspan(count);
}

Event Scheduler::pool(Sequence& sequence, double now) {
  stats_.prompt_tokens += sequence.num_prompt;
  sequence.finish = Finish::STOP;
  Event event = make_event(sequence, sequence.finish, now);
  const double count = sequence.params.pooling == Pooling::MEAN ? sequence.num_prompt : 1;
  for (double sum : sequence.pooled) event.embedding.push_back(static_cast<float>(sum / count));
  return event;
}

Event Scheduler::append(Sequence& sequence, Sampled sampled, double now) {
  if (sequence.num_output() == 0) stats_.prompt_tokens += sequence.num_prompt;
  const size_t before = sequence.tokens.size();
  if (!sequence.error.empty())
    sequence.finish = Finish::ERROR;
  else if (sequence.params.max_tokens == 0)
    sequence.finish = Finish::LENGTH;  // the prompt was to be read, no more
  else if (!sequence.forced.empty())
    append_forced(sequence);
  else
    append_token(sequence, sampled.token);
  Event event = make_event(sequence, sequence.finish, now);
  event.error = sequence.error;
  event.prompt_logprobs = std::exchange(sequence.prompt_logprobs, {});
  event.tokens.assign(sequence.tokens.begin() + static_cast<int64_t>(before), sequence.tokens.end());
  const bool first = before == static_cast<size_t>(sequence.num_prompt);
  event.wakes = sequence.params.eager || first || sequence.finish != Finish::NONE;
  stats_.generation_tokens += static_cast<int64_t>(event.tokens.size());
  if (!sampled.logprobs.empty() && !event.tokens.empty())
    event.logprobs.push_back(std::move(sampled.logprobs));
  return event;
}

void Scheduler::remove_finished() {
  std::erase_if(running_, [this](Sequence* sequence) {
    if (sequence->finish == Finish::NONE) return false;
    release(*sequence);
    sequences_.erase(uint64_t{sequence->id});
    return true;
  });
}

std::vector<Event> Scheduler::fail_all() {
  std::vector<Event> events;
  waiting_.insert(waiting_.begin(), running_.begin(), running_.end());
  for (Sequence* sequence : waiting_) {
    events.push_back(make_event(*sequence, Finish::ERROR, stats_.last_step_time));
    release(*sequence);
  }
  running_.clear();
  waiting_.clear();
  sequences_.clear();
  return events;
}

void Scheduler::forget_prefixes() {
  pool_.forget_cached();
}

void Scheduler::fill(Stats& stats) const {
  stats.num_running = static_cast<int32_t>(running_.size());
  stats.num_waiting = static_cast<int32_t>(waiting_.size());
  stats.num_blocks = pool_.num_blocks();
  stats.num_free_blocks = pool_.num_free();
  stats.num_steps = stats_.num_steps;
  stats.num_preemptions = stats_.num_preemptions;
  stats.prefix_cache_queries = stats_.prefix_cache_queries;
  stats.prefix_cache_hits = stats_.prefix_cache_hits;
  stats.prompt_tokens = stats_.prompt_tokens;
  stats.generation_tokens = stats_.generation_tokens;
  stats.step_tokens = stats_.step_tokens;
  stats.steps_by_size = stats_.steps_by_size;
  stats.last_step_time = stats_.last_step_time;
}

void Scheduler::check_integrity() const {
  std::vector<const std::vector<int32_t>*> tables;
  for (const Sequence* sequence : running_) {
    tables.push_back(&sequence->blocks);
    check(sequence->num_computed < sequence->size(), "a running sequence has nothing left to compute");
    check(sequence->num_published <= sequence->num_computed / kBlockSize,
          "a block is shared before it is computed");
    check(sequence->num_computed <= int64_t(sequence->blocks.size()) * kBlockSize,
          "computed tokens have no block");
  }
  for (const Sequence* sequence : waiting_)
    check(sequence->blocks.empty() && sequence->num_computed == 0, "a waiting sequence holds blocks");
  check(running_.size() + waiting_.size() == sequences_.size(), "a sequence is neither running nor waiting");
  check(running_.size() <= size_t(options_.max_num_seqs), "more sequences run than max_num_seqs");
  pool_.check_integrity(tables);
}

}  // namespace engine
