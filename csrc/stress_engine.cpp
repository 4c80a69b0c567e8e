// The whole engine on a tiny random model under load from several threads, for the sanitizers: no Python.
// Every request must give what it gives alone, whatever is submitted and cancelled around it. Exits with 1
// and a reason otherwise.
//
//   stress_engine [requests]
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "engine/engine.h"

namespace engine {
namespace {

constexpr int kTimeoutMs = 120000;
constexpr int kVocab = 48;

ModelConfig tiny_config() {
  ModelConfig c;
  c.vocab_size = kVocab;
  c.hidden_size = 32;
  c.intermediate_size = 48;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 8;
  c.attention_scale = 0.35f;
  c.rope_inv_freq = {1.0f, 0.1f, 0.01f, 0.001f};
  c.sliding_window = {0, 0};
  return c;
}

// A file of random f32 tensors and the index of what lies where.
class RandomCheckpoint {
 public:
  explicit RandomCheckpoint(const ModelConfig& c) {
    const int fd = mkstemp(path_);
    check(fd >= 0, "a temporary file");
    file_ = fdopen(fd, "wb");
    add("embed", {c.vocab_size, c.hidden_size});
    add("final_norm", {c.hidden_size});
    for (int i = 0; i < c.num_hidden_layers; ++i) {
      const std::string layer = "layers." + std::to_string(i) + ".";
      add(layer + "attn_norm", {c.hidden_size});
      add(layer + "qkv", {c.qkv_size(), c.hidden_size});
      add(layer + "attn_out", {c.hidden_size, c.q_size()});
      add(layer + "mlp_norm", {c.hidden_size});
      add(layer + "mlp_in", {c.mlp_in_size(), c.hidden_size});
      add(layer + "mlp_out", {c.hidden_size, c.intermediate_size});
    }
    std::fclose(file_);
  }
  ~RandomCheckpoint() { unlink(path_); }

  const TensorIndex& index() const { return index_; }

 private:
  void add(const std::string& role, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (int64_t n : shape) count *= n;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& v : values) v = static_cast<float>(random_uniform(offset_, next_++) - 0.5);
    check(std::fwrite(values.data(), sizeof(float), values.size(), file_) == values.size(),
          "writing weights");
    index_[role] = {{role, Format::F32, std::move(shape), path_, offset_}};
    offset_ += values.size() * sizeof(float);
  }

  char path_[32] = "/tmp/stress_engine_XXXXXX";
  FILE* file_ = nullptr;
  uint64_t offset_ = 0, next_ = 0;
  TensorIndex index_;
};

// A pure function of the number: the same request alone and in the crowd.
Request make_request(uint64_t number) {
  const auto draw = [&](uint64_t what, uint64_t low, uint64_t high) {
    return static_cast<int32_t>(low + random_bits(number, what) % (high - low + 1));
  };
  Request request;
  const int32_t shared = draw(0, 0, 40);
  for (int32_t i = draw(1, 1, 60); i > 0; --i)
    request.prompt.push_back(i > shared ? i % kVocab : draw(100 + i, 0, 47));
  request.params.max_tokens = draw(2, 1, 60);
  request.params.temperature = static_cast<float>(draw(3, 0, 1));
  request.params.seed = number;
  request.params.stop_token_ids = {draw(4, 0, kVocab - 1)};
  request.params.constrained = draw(5, 0, 1) == 1;
  request.params.pooling = static_cast<Pooling>(std::max(0, draw(6, 0, 9) - 7));
  if (request.params.pooling != Pooling::NONE)
    request.params.constrained = false, request.params.max_tokens = 0;
  return request;
}

// Answers what constrained requests may say next: a pure function of what each has said so far. Now and then
// there is only one way on, for some tokens.
void constrain(Engine& engine) {
  std::unordered_map<uint64_t, uint64_t> states;
  while (auto demands = engine.masks().wait()) {
    std::vector<MaskAnswer> answers(demands->size());
    for (size_t i = 0; i < answers.size(); ++i) {
      const MaskDemand& demand = (*demands)[i];
      uint64_t& state = states[demand.request_id];
      for (int32_t token : demand.tokens) state = random_bits(state, static_cast<uint64_t>(token));
      const auto only = static_cast<int32_t>(state % kVocab);
      if (state % 4 == 0)
        answers[i].forced.assign(state % 7 + 1, only);
      else
        for (int32_t token = 0; token < kVocab; ++token)
          if (token == only || random_bits(state, static_cast<uint64_t>(token) + 1000) % 3 == 0)
            demand.mask[token / 32] |= 1u << (token % 32);
    }
    engine.masks().answer(std::move(answers));
  }
}

struct Answer {
  std::vector<int32_t> tokens;
  std::vector<float> embedding;
  Finish finish = Finish::NONE;
};

// Reads events until `count` requests have had their last one.
std::unordered_map<uint64_t, Answer> collect(Engine& engine, size_t count) {
  std::unordered_map<uint64_t, Answer> answers;
  for (size_t finished = 0; finished < count;) {
    pollfd readable{engine.fileno(), POLLIN, 0};
    check(poll(&readable, 1, kTimeoutMs) == 1, "requests are open and nothing comes");
    for (const Event& event : engine.drain()) {
      Answer& answer = answers[event.request_id];
      check(answer.finish == Finish::NONE, "an event after the last one");
      answer.tokens.insert(answer.tokens.end(), event.tokens.begin(), event.tokens.end());
      answer.embedding = event.embedding;
      answer.finish = event.finish;
      finished += event.finish != Finish::NONE;
    }
    engine.stats();
  }
  return answers;
}

void compare(uint64_t number, const Answer& alone, const Answer& crowd) {
  const bool aborted = crowd.finish == Finish::ABORT;
  check(aborted || crowd.finish == alone.finish, "request " + std::to_string(number) + " ended otherwise");
  check(crowd.tokens.size() <= alone.tokens.size() &&
            (aborted || crowd.tokens.size() == alone.tokens.size()) &&
            std::equal(crowd.tokens.begin(), crowd.tokens.end(), alone.tokens.begin()),
        "request " + std::to_string(number) + " gave other tokens than alone");
  check(aborted || crowd.embedding == alone.embedding,
        "request " + std::to_string(number) + " gave another vector than alone");
}

void stress(uint64_t num_requests) {
  const ModelConfig config = tiny_config();
  const RandomCheckpoint checkpoint(config);
  EngineOptions options;
  options.num_threads = 2;
  options.max_position = options.max_model_len = 128;
  options.max_num_seqs = 8;
  options.max_num_batched_tokens = 48;
  options.memory_bytes = 190 << 10;  // blocks for one long sequence and a half: preemption
  Loading loading;
  Engine engine(config, checkpoint.index(), options, loading);
  std::thread constraints([&engine] { constrain(engine); });

  std::vector<Answer> alone;
  for (uint64_t number = 0; number < num_requests; ++number) {
    Request request = make_request(number);
    request.id = number;
    engine.submit(std::move(request));
    alone.push_back(collect(engine, 1).at(number));
  }

  std::mutex mutex;
  std::unordered_map<uint64_t, uint64_t> number_of;  // id → number
  std::atomic<uint64_t> next = 0;
  uint64_t id = num_requests;
  const auto produce = [&] {
    for (uint64_t number; (number = next++) < num_requests;) {
      Request request = make_request(number);
      const std::lock_guard lock(mutex);
      request.id = id++;
      number_of[request.id] = number;
      engine.submit(std::move(request));
      if (random_bits(number, 5) % 4 == 0) engine.cancel(id - 1 - random_bits(number, 6) % 4);
    }
  };
  std::vector<std::thread> producers;
  for (int i = 0; i < 3; ++i) producers.emplace_back(produce);
  const auto answers = collect(engine, num_requests);
  for (std::thread& producer : producers) producer.join();
  for (const auto& [request_id, answer] : answers) {
    const uint64_t number = number_of.at(request_id);
    compare(number, alone[number], answer);
  }
  const Stats stats = engine.stats();
  engine.stop();
  constraints.join();
  std::printf("%lld steps, %lld preemptions, %lld prompt tokens cached\n",
              static_cast<long long>(stats.num_steps), static_cast<long long>(stats.num_preemptions),
              static_cast<long long>(stats.prefix_cache_hits));
  check(stats.num_preemptions > 0, "the cache was meant to be too small");
}

}  // namespace
}  // namespace engine

int main(int argc, char** argv) {
  try {
    engine::stress(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 300);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "stress_engine: %s\n", error.what());
    return 1;
  }
  return 0;
}
