// Test-only module: the scheduling core on plain Python values.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "base/check.h"
#include "engine/batch.h"
#include "engine/block_pool.h"
#include "engine/mailbox.h"
#include "engine/scheduler.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace engine {
namespace {

BlockKey make_key(PrefixId prefix, const std::vector<int32_t>& tokens) {
  check(tokens.size() == kBlockSize, "a key holds kBlockSize tokens");
  BlockKey key{.prefix = prefix};
  std::ranges::copy(tokens, key.tokens.begin());
  return key;
}

void check_tables(const BlockPool& pool, const std::vector<std::vector<int32_t>>& tables) {
  std::vector<const std::vector<int32_t>*> pointers;
  for (const auto& table : tables) pointers.push_back(&table);
  pool.check_integrity(pointers);
}

constexpr std::string_view kPoolings[] = {"", "last", "mean"};

const char* finish_name(Finish finish) {
  constexpr const char* names[] = {"", "stop", "length", "abort", "error", "repetition"};
  return names[static_cast<int>(finish)];
}

nb::dict to_python(const Stats& stats) {
  nb::dict out;
  out["num_running"] = stats.num_running;
  out["num_waiting"] = stats.num_waiting;
  out["num_blocks"] = stats.num_blocks;
  out["num_free_blocks"] = stats.num_free_blocks;
  out["num_steps"] = stats.num_steps;
  out["num_preemptions"] = stats.num_preemptions;
  out["prefix_cache_queries"] = stats.prefix_cache_queries;
  out["prefix_cache_hits"] = stats.prefix_cache_hits;
  out["prompt_tokens"] = stats.prompt_tokens;
  out["generation_tokens"] = stats.generation_tokens;
  out["step_tokens"] = stats.step_tokens;
  out["steps_by_size"] = std::vector<int64_t>(stats.steps_by_size.begin(), stats.steps_by_size.end());
  out["last_step_time"] = stats.last_step_time;
  return out;
}

nb::dict to_python(const Batch& batch) {
  nb::list sequences, sampling;
  for (const BatchSequence& s : batch.sequences)
    sequences.append(nb::make_tuple(s.first_token, s.num_tokens, s.num_computed, s.first_block));
  for (const SamplingRow& row : batch.sampling)
    sampling.append(nb::make_tuple(std::vector<int32_t>(row.tokens.begin(), row.tokens.end()), row.num_prompt,
                                   row.position, row.params->seed));
  nb::list scoring;
  for (const ScoringRow& row : batch.scoring) scoring.append(nb::make_tuple(row.token, row.num_logprobs));
  nb::dict out;
  out["tokens"] = batch.tokens;
  out["positions"] = batch.positions;
  out["sequences"] = sequences;
  out["block_tables"] = batch.block_tables;
  out["logit_rows"] = batch.logit_rows;
  out["sampling"] = sampling;
  out["scoring_rows"] = batch.scoring_rows;
  out["scoring"] = scoring;
  out["pooling_rows"] = batch.pooling_rows;
  return out;
}

// A scheduler and the step under way.
class SteppedScheduler {
 public:
  explicit SteppedScheduler(const SchedulerOptions& options) : scheduler(options) {}

  const Step& schedule(double now) { return step = scheduler.schedule(now); }

  std::vector<Event> commit(const std::vector<int32_t>& tokens, double now) {
    std::vector<Sampled> sampled(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i)
      sampled[i] = {.token = tokens[i], .logprobs = {{tokens[i], -0.5f, 1}}};
    std::vector<TokenLogprobs> scored;
    for (const ScheduledSequence& s : step) {
      const PromptRange range = scored_range(s);
      for (int32_t i = range.first; i < range.last; ++i)
        scored.push_back({{s.sequence->tokens[static_cast<size_t>(i) + 1], -0.5f, 1}});
    }
    return scheduler.commit(std::exchange(step, {}), sampled, scored, now);
  }

  // What a constraint answers about a sequence of the step under way.
  void force(uint64_t id, std::vector<int32_t> tokens, std::string error) {
    const auto found =
        std::ranges::find(step, id, [](const auto& scheduled) { return scheduled.sequence->id; });
    check(found != step.end(), "the step has no such sequence");
    found->sequence->forced = std::move(tokens);
    found->sequence->error = std::move(error);
  }

  nb::dict stats() const {
    Stats stats;
    scheduler.fill(stats);
    return to_python(stats);
  }

  Scheduler scheduler;
  Step step;
};

void bind_values(nb::module_& m) {
  nb::class_<SamplingParams>(m, "SamplingParams")
      .def(nb::init<>())
      .def_rw("temperature", &SamplingParams::temperature)
      .def_rw("top_p", &SamplingParams::top_p)
      .def_rw("min_p", &SamplingParams::min_p)
      .def_rw("top_k", &SamplingParams::top_k)
      .def_rw("presence_penalty", &SamplingParams::presence_penalty)
      .def_rw("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_rw("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_rw("logit_bias", &SamplingParams::logit_bias)
      .def_rw("seed", &SamplingParams::seed)
      .def_rw("num_logprobs", &SamplingParams::num_logprobs)
      .def_rw("max_tokens", &SamplingParams::max_tokens)
      .def_rw("min_tokens", &SamplingParams::min_tokens)
      .def_rw("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_rw("allowed_token_ids", &SamplingParams::allowed_token_ids)
      .def_rw("bad_words", &SamplingParams::bad_words)
      .def_rw("logprob_token_ids", &SamplingParams::logprob_token_ids)
      .def_rw("num_prompt_logprobs", &SamplingParams::num_prompt_logprobs)
      .def_prop_rw(
          "repetition_detection",  // (max_pattern_size, min_pattern_size, min_count)
          [](const SamplingParams& p) {
            const RepetitionDetection& r = p.repetition_detection;
            return std::tuple(r.max_pattern_size, r.min_pattern_size, r.min_count);
          },
          [](SamplingParams& p, std::tuple<int32_t, int32_t, int32_t> r) {
            p.repetition_detection = {std::get<0>(r), std::get<1>(r), std::get<2>(r)};
          })
      .def_prop_rw(
          "pooling",
          [](const SamplingParams& p) { return std::string(kPoolings[static_cast<size_t>(p.pooling)]); },
          [](SamplingParams& p, const std::string& name) {
            p.pooling = static_cast<Pooling>(std::ranges::find(kPoolings, name) - std::begin(kPoolings));
          })
      .def_rw("priority", &SamplingParams::priority)
      .def_rw("cache_salt", &SamplingParams::cache_salt)
      .def_rw("constrained", &SamplingParams::constrained)
      .def_rw("eager", &SamplingParams::eager);
  nb::class_<Event>(m, "Event")
      .def_ro("request_id", &Event::request_id)
      .def_ro("tokens", &Event::tokens)
      .def_prop_ro("prompt_logprobs",
                   [](const Event& event) {
                     std::vector<int32_t> tokens;
                     for (const TokenLogprobs& one : event.prompt_logprobs) tokens.push_back(one.at(0).token);
                     return tokens;
                   })
      .def_prop_ro("num_logprobs", [](const Event& event) { return event.logprobs.size(); })
      .def_prop_ro("finish", [](const Event& event) { return finish_name(event.finish); })
      .def_ro("error", &Event::error)
      .def_ro("num_cached_tokens", &Event::num_cached_tokens)
      .def_ro("scheduled_time", &Event::scheduled_time)
      .def_ro("time", &Event::time)
      .def_ro("wakes", &Event::wakes);
  nb::class_<ScheduledSequence>(m, "ScheduledSequence")
      .def_ro("num_tokens", &ScheduledSequence::num_tokens)
      .def_prop_ro("catches_up", &catches_up)
      .def_prop_ro("samples", &samples)
      .def_prop_ro("id", [](const ScheduledSequence& s) { return s.sequence->id; })
      .def_prop_ro("tokens", [](const ScheduledSequence& s) { return s.sequence->tokens; })
      .def_prop_ro("num_computed", [](const ScheduledSequence& s) { return s.sequence->num_computed; })
      .def_prop_ro("blocks", [](const ScheduledSequence& s) { return s.sequence->blocks; });
}

void bind_block_pool(nb::module_& m) {
  nb::class_<BlockPool>(m, "BlockPool")
      .def(nb::init<int32_t, int32_t>(), "num_blocks"_a, "max_cached"_a = INT32_MAX)
      .def_prop_ro("num_free", &BlockPool::num_free)
      .def("is_free", &BlockPool::is_free)
      .def("allocate", &BlockPool::allocate)
      .def("find", [](const BlockPool& pool, PrefixId prefix,
                      const std::vector<int32_t>& tokens) { return pool.find(make_key(prefix, tokens)); })
      .def("acquire", &BlockPool::acquire)
      .def("release", &BlockPool::release)
      .def("publish",
           [](BlockPool& pool, int32_t block, PrefixId prefix, const std::vector<int32_t>& tokens) {
             return pool.publish(block, make_key(prefix, tokens));
           })
      .def("prefix", &BlockPool::prefix)
      .def("root", &BlockPool::root)
      .def("forget_cached", &BlockPool::forget_cached)
      .def("check_integrity", &check_tables, "tables"_a);
}

void bind_scheduler(nb::module_& m) {
  nb::class_<SteppedScheduler>(m, "Scheduler")
      .def(
          "__init__",
          [](SteppedScheduler* self, int32_t num_blocks, int32_t max_num_seqs, int32_t max_num_batched_tokens,
             bool enable_prefix_caching) {
            new (self)
                SteppedScheduler({num_blocks, max_num_seqs, max_num_batched_tokens, enable_prefix_caching});
          },
          "num_blocks"_a, "max_num_seqs"_a = 256, "max_num_batched_tokens"_a = 2048,
          "enable_prefix_caching"_a = true)
      .def("submit",
           [](SteppedScheduler& self, uint64_t id, std::vector<int32_t> prompt,
              const SamplingParams& params) { self.scheduler.submit({id, std::move(prompt), params}); })
      .def("cancel", [](SteppedScheduler& self, uint64_t id) { return self.scheduler.cancel(id); })
      .def_prop_ro("busy", [](const SteppedScheduler& self) { return self.scheduler.busy(); })
      .def("schedule", &SteppedScheduler::schedule, "now"_a = 0.0)
      .def("make_batch", [](const SteppedScheduler& self) { return to_python(make_batch(self.step)); })
      .def("force", &SteppedScheduler::force, "id"_a, "tokens"_a, "error"_a = "")
      .def("commit", &SteppedScheduler::commit, "tokens"_a, "now"_a = 0.0)
      .def("forget_prefixes", [](SteppedScheduler& self) { self.scheduler.forget_prefixes(); })
      .def("fail_all", [](SteppedScheduler& self) { return self.scheduler.fail_all(); })
      .def("stats", &SteppedScheduler::stats)
      .def("check_integrity", [](const SteppedScheduler& self) { self.scheduler.check_integrity(); });
}

// Letters as (id, prompt), or (id, None) for a Cancel.
using PlainLetter = std::pair<uint64_t, std::optional<std::vector<int32_t>>>;

std::optional<std::vector<PlainLetter>> take(Inbox& inbox, bool wait) {
  auto mail = inbox.take(wait);
  if (!mail) return std::nullopt;
  std::vector<PlainLetter> out;
  for (Letter& letter : *mail) {
    if (auto* request = std::get_if<Request>(&letter))
      out.emplace_back(request->id, std::move(request->prompt));
    else
      out.emplace_back(std::get<Cancel>(letter).id, std::nullopt);
  }
  return out;
}

void post(Outbox& outbox, const std::vector<std::pair<uint64_t, std::vector<int32_t>>>& plain, bool wakes) {
  std::vector<Event> events(plain.size());
  for (size_t i = 0; i < plain.size(); ++i) {
    std::tie(events[i].request_id, events[i].tokens) = plain[i];
    events[i].wakes = wakes;
  }
  outbox.post(std::move(events));
}

void bind_mailbox(nb::module_& m) {
  nb::class_<Inbox>(m, "Inbox")
      .def(nb::init<>())
      .def("post_request",
           [](Inbox& inbox, uint64_t id, std::vector<int32_t> prompt) {
             return inbox.post(Request{id, std::move(prompt), {}});
           })
      .def("post_cancel", [](Inbox& inbox, uint64_t id) { return inbox.post(Cancel{id}); })
      .def("close", &Inbox::close)
      .def("take", &take, "wait"_a, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Outbox>(m, "Outbox")
      .def(nb::init<>())
      .def("fileno", &Outbox::fileno)
      .def("post", &post, "events"_a, "wakes"_a = true, nb::call_guard<nb::gil_scoped_release>())
      .def("drain", &Outbox::drain, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace
}  // namespace engine

NB_MODULE(_engine_test, m) {
  using namespace engine;
  nb::exception<InvariantError>(m, "InvariantError");
  bind_values(m);
  bind_block_pool(m);
  bind_scheduler(m);
  bind_mailbox(m);
  m.attr("KV_BLOCK_SIZE") = kBlockSize;
  m.def(
      "validate",
      [](std::vector<int32_t> prompt, const SamplingParams& params, int32_t vocab_size, int32_t max_model_len,
         int64_t cache_tokens) {
        validate({0, std::move(prompt), params}, vocab_size, max_model_len, cache_tokens);
      },
      "prompt"_a, "params"_a, "vocab_size"_a, "max_model_len"_a, "cache_tokens"_a);
}
