// Mailboxes, scheduler and batches under load from several threads, for the sanitizers: no Python, no
// kernels. The fake model's keys and values are hashes of all tokens so far, read back through the block
// tables, so a wrong block gives wrong text. Prints what went wrong and exits with 1.
//
//   stress [requests per producer]
#include <poll.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "engine/batch.h"
#include "engine/mailbox.h"
#include "engine/scheduler.h"

namespace engine {
namespace {

constexpr int32_t kNumBlocks = 24;
constexpr int32_t kVocab = 1000;
constexpr int kNumProducers = 3;
constexpr int kTimeoutMs = 30000;

uint64_t extend(uint64_t state, int32_t token) {
  return mix64(state ^ (static_cast<uint64_t>(token) + 1));
}
int32_t sample(uint64_t state) {
  return static_cast<int32_t>(state % kVocab);
}

// A pure function of the id: the consumer knows what to expect without asking the producer.
Request make_request(uint64_t id) {
  const auto number = [&](uint64_t what, uint64_t low, uint64_t high) {
    return static_cast<int32_t>(low + random_bits(id, what) % (high - low + 1));
  };
  Request request{.id = id, .prompt = std::vector<int32_t>(number(0, 1, 200)), .params = {}};
  const int32_t shared = number(1, 0, 150);  // most prompts begin alike
  for (int32_t i = 0; i < static_cast<int32_t>(request.prompt.size()); ++i)
    request.prompt[i] = i < shared ? i : number(1000 + i, 0, kVocab - 1);
  request.params.max_tokens = number(2, 1, 180);
  for (int i = number(3, 0, 8); i > 0; --i)
    request.params.stop_token_ids.push_back(number(10 + i, 0, kVocab - 1));
  return request;
}

struct Answer {
  std::vector<int32_t> tokens;
  Finish finish = Finish::NONE;
};

Answer answer_alone(const Request& request) {
  uint64_t state = 0;
  for (int32_t token : request.prompt) state = extend(state, token);
  Answer answer;
  while (answer.finish == Finish::NONE) {
    const int32_t token = sample(state);
    answer.tokens.push_back(token);
    state = extend(state, token);
    for (int32_t stop : request.params.stop_token_ids)
      if (token == stop) answer.finish = Finish::STOP;
    if (answer.finish == Finish::NONE && answer.tokens.size() == size_t(request.params.max_tokens))
      answer.finish = Finish::LENGTH;
  }
  return answer;
}

class FakeModel {
 public:
  std::vector<Sampled> forward(const Batch& batch) {
    std::vector<uint64_t> states(batch.tokens.size());
    for (const BatchSequence& sequence : batch.sequences) {
      const int32_t* blocks = &batch.block_tables[sequence.first_block];
      for (int32_t row = sequence.first_token; row < sequence.first_token + sequence.num_tokens; ++row) {
        const int32_t position = batch.positions[row];
        const uint64_t before = position == 0 ? 0 : at(blocks, position - 1);
        states[row] = at(blocks, position) = extend(before, batch.tokens[row]);
      }
    }
    std::vector<Sampled> next(batch.logit_rows.size());
    for (size_t i = 0; i < next.size(); ++i) next[i].token = sample(states[batch.logit_rows[i]]);
    return next;
  }

 private:
  uint64_t& at(const int32_t* blocks, int32_t position) {
    return cache_[blocks[position / kBlockSize] * kBlockSize + position % kBlockSize];
  }

  std::vector<uint64_t> cache_ = std::vector<uint64_t>(kNumBlocks * kBlockSize);
};

// The engine's loop. Leaves when the inbox is closed.
void run_engine(Inbox& inbox, Outbox& outbox) {
  Scheduler scheduler({.num_blocks = kNumBlocks, .max_num_seqs = 8, .max_num_batched_tokens = 128});
  FakeModel model;
  while (auto mail = inbox.take(!scheduler.busy())) {
    for (Letter& letter : *mail) {
      if (auto* request = std::get_if<Request>(&letter))
        scheduler.submit(std::move(*request));
      else if (auto aborted = scheduler.cancel(std::get<Cancel>(letter).id))
        outbox.post({std::move(*aborted)});
    }
    if (!scheduler.busy()) continue;
    const Step step = scheduler.schedule(0);
    std::vector<Sampled> next = model.forward(make_batch(step));
    outbox.post(scheduler.commit(step, next, {}, 0));
    scheduler.check_integrity();
  }
  Stats stats;
  scheduler.fill(stats);
  check(!scheduler.busy() && stats.num_free_blocks == kNumBlocks, "blocks or requests are left over");
  std::printf("%lld steps, %lld tokens, %lld preemptions, %lld of %lld prompt tokens cached\n",
              static_cast<long long>(stats.num_steps), static_cast<long long>(stats.generation_tokens),
              static_cast<long long>(stats.num_preemptions), static_cast<long long>(stats.prefix_cache_hits),
              static_cast<long long>(stats.prefix_cache_queries));
}

// Requests [first, first + count); about every eighth is cancelled some time later.
void run_producer(Inbox& inbox, uint64_t first, uint64_t count) {
  for (uint64_t id = first; id < first + count; ++id) {
    Request request = make_request(id);
    validate(request, kVocab, kNumBlocks * kBlockSize, kNumBlocks * kBlockSize);
    check(inbox.post(std::move(request)), "the inbox is closed");
    const uint64_t back = random_bits(id, 4) % 64;
    if (back < 8 && first + back * 2 <= id) inbox.post(Cancel{id - back * 2});
    if (id % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_bits(id, 5) % 2000));
  }
}

// Takes events until each of `count` requests has had its last one.
void run_consumer(Outbox& outbox, uint64_t count) {
  std::unordered_map<uint64_t, Answer> answers;
  for (uint64_t finished = 0; finished < count;) {
    pollfd readable{.fd = outbox.fileno(), .events = POLLIN, .revents = 0};
    check(poll(&readable, 1, kTimeoutMs) == 1, "requests are open and nothing comes");
    const std::vector<Event> events = outbox.drain();
    check(!events.empty(), "a wake-up for nothing");
    for (const Event& event : events) {
      Answer& answer = answers[event.request_id];
      check(answer.finish == Finish::NONE, "an event after the last one");
      answer.tokens.insert(answer.tokens.end(), event.tokens.begin(), event.tokens.end());
      answer.finish = event.finish;
      finished += event.finish != Finish::NONE;
    }
  }
  for (const auto& [id, answer] : answers) {
    Answer expected = answer_alone(make_request(id));
    if (answer.finish == Finish::ABORT) {
      check(answer.tokens.size() <= expected.tokens.size(), "more tokens than asked for");
      expected = {{expected.tokens.begin(), expected.tokens.begin() + answer.tokens.size()}, Finish::ABORT};
    }
    check(answer.tokens == expected.tokens && answer.finish == expected.finish,
          "request " + std::to_string(id) + " was answered otherwise than alone");
  }
}

// Any exception ends the process: the other threads may be waiting for this one.
template <typename F>
std::thread start(F run) {
  return std::thread([run] {
    try {
      run();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "stress: %s\n", error.what());
      std::_Exit(1);
    }
  });
}

void stress(uint64_t requests_each) {
  Inbox inbox;
  Outbox outbox;
  std::thread engine = start([&] { run_engine(inbox, outbox); });
  std::thread consumer = start([&] { run_consumer(outbox, kNumProducers * requests_each); });
  std::vector<std::thread> producers;
  for (uint64_t i = 0; i < kNumProducers; ++i)
    producers.push_back(
        start([&inbox, i, requests_each] { run_producer(inbox, i * requests_each, requests_each); }));
  for (std::thread& producer : producers) producer.join();
  consumer.join();
  inbox.close();
  engine.join();
}

}  // namespace
}  // namespace engine

int main(int argc, char** argv) {
  engine::stress(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1000);
  return 0;
}
