#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "base/check.h"
#include "engine/batch.h"
#include "model/weights.h"

namespace engine {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t blocks_for(int64_t tokens) {
  return (tokens + kBlockSize - 1) / kBlockSize;
}

std::string mib(int64_t bytes) {
  return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB";
}

// When the user names no budget, a server stays modest: what the cache may grow to while requests need it (it
// is committed as it fills and never given back), and what it may keep for prefixes that nobody uses at the
// moment.
constexpr int64_t kDefaultCacheBytes = int64_t{2} << 30, kDefaultIdleBytes = int64_t{128} << 20;

int32_t max_cached_blocks(const EngineOptions& options, int64_t weight_bytes, int64_t bytes_per_block) {
  if (options.memory_bytes > 0) return INT32_MAX;
  return static_cast<int32_t>(std::max(kDefaultIdleBytes, weight_bytes / 4) / bytes_per_block);
}

int64_t longest_sequence(const EngineOptions& options) {
  return options.max_model_len > 0 ? options.max_model_len : options.max_position;
}

// More could never be used at once.
int64_t most_blocks(const EngineOptions& options) {
  return blocks_for(longest_sequence(options)) * options.max_num_seqs;
}

// Fills in max_model_len and returns the number of cache blocks that suits the budget left for the cache.
int32_t size_cache(EngineOptions& options, int64_t budget, int64_t bytes_per_block) {
  const bool given = options.max_model_len > 0;
  const int64_t longest = longest_sequence(options);
  if (options.memory_bytes == 0)
    budget = std::min(budget, std::max(kDefaultCacheBytes, blocks_for(longest) * bytes_per_block));
  const int64_t blocks =
      std::min({budget / bytes_per_block, most_blocks(options), int64_t{INT32_MAX / kBlockSize}});
  require(blocks >= 1 && (!given || blocks >= blocks_for(longest)),
          "the key/value cache of one sequence of " + std::to_string(longest) + " tokens needs " +
              mib(blocks_for(longest) * bytes_per_block) + ", but " + mib(std::max<int64_t>(budget, 0)) +
              " are left for it: raise --memory (or --gpu-memory-utilization) or lower --max-model-len");
  options.max_model_len = static_cast<int32_t>(std::min(longest, blocks * kBlockSize));
  return static_cast<int32_t>(blocks);
}

void validate_options(const EngineOptions& o) {
  require(o.max_num_seqs >= 1, "max_num_seqs must be at least 1");
  require(o.max_num_batched_tokens >= 1, "max_num_batched_tokens must be at least 1");
  require(o.memory_bytes >= 0, "memory_bytes must be at least 0 (half of what is available)");
  require(o.gpu_memory_utilization > 0 && o.gpu_memory_utilization <= 1,
          "gpu_memory_utilization must be above 0 and at most 1");
  require(o.max_position >= 1, "max_position must be at least 1");
  require(o.max_model_len >= 0 && o.max_model_len <= o.max_position,
          "max_model_len " + std::to_string(o.max_model_len) + " is beyond the model's own limit of " +
              std::to_string(o.max_position) + " tokens");
  require(is_plain(o.kv_format) || o.kv_format == Format::INT8, "kv_format must be F32, F16, BF16 or INT8");
}

}  // namespace

Engine::Engine(const ModelConfig& config, const TensorIndex& tensors, const EngineOptions& options,
               Loading& loading)
    : options_(options), config_(config), masks_(config.vocab_size) {
  config_.validate();
  validate_options(options_);
  device_ = make_device({.kind = options_.device,
                         .num_threads = options_.num_threads,
                         .arithmetic = options_.exact ? Arithmetic::EXACT : Arithmetic::ROUNDED,
                         .record_graphs = !options_.enforce_eager});
  const auto available = static_cast<int64_t>(device_->memory_available());
  require(options_.memory_bytes <= available,
          "the engine may use " + mib(options_.memory_bytes) + " of memory, but only " + mib(available) +
              " are available on " + device_->name() + ": lower --memory");
  if (options_.memory_bytes == 0)
    options_.memory_bytes = static_cast<int64_t>(device_->memory_budget(options_.gpu_memory_utilization));
  const int64_t memory =
      options_.memory_bytes > 0 ? options_.memory_bytes : static_cast<int64_t>(device_->memory_default());
  // A step never runs more sequences than tokens, and never samples more rows than sequences. Prompts are
  // scored in pieces of as many rows; with fewer than 16 the weights of the head would be read for next to
  // nothing.
  const int max_tokens = options_.max_num_batched_tokens;
  const int max_logits = std::min(std::max(options_.max_num_seqs, 16), max_tokens);
  const auto activations =
      static_cast<int64_t>(Transformer::activation_bytes(config_, *device_, max_tokens, max_logits));
  const int64_t loaded = loaded_bytes(tensors, options_.weight_format);
  require(loaded + activations < memory,
          "the weights (" + mib(loaded) + ") and activations (" + mib(activations) + ") do not fit in " +
              mib(memory) + " of memory on " + device_->name() +
              ": raise --memory (or --gpu-memory-utilization), lower --max-num-batched-tokens or take a "
              "smaller model");
  device_->reserve(static_cast<size_t>(memory));

  Weights weights = load_weights(config_, tensors, options_.weight_format, *device_, loading);
  weight_bytes_ = weights.bytes();
  const auto bytes_per_block = static_cast<int64_t>(device_->kv_bytes_per_block(config_, options_.kv_format));
  const auto scratch =
      static_cast<int64_t>(device_->reserve_scratch(config_, max_tokens, most_blocks(options_)));
  const int32_t num_blocks = size_cache(
      options_, memory - static_cast<int64_t>(weight_bytes_) - activations - scratch, bytes_per_block);
  transformer_ = std::make_unique<Transformer>(config_, std::move(weights), *device_, max_tokens, max_logits);
  transformer_->kv_alloc(options_.kv_format, num_blocks);
  scheduler_ = std::make_unique<Scheduler>(SchedulerOptions{
      num_blocks, options_.max_num_seqs, options_.max_num_batched_tokens, options_.enable_prefix_caching,
      max_cached_blocks(options_, static_cast<int64_t>(weight_bytes_), bytes_per_block)});
  cache_tokens_ = int64_t{num_blocks} * kBlockSize;
  scheduler_->fill(stats_);
  thread_ = std::thread([this] { run(); });
}

Engine::~Engine() {
  stop();
}

void Engine::stop() {
  inbox_.close();
  masks_.close();
  std::call_once(joined_, [this] { thread_.join(); });
}

void Engine::submit(Request request) {
  validate(request, config_.vocab_size, options_.max_model_len, cache_tokens_);
  uint64_t next = next_id_;
  do {
    if (request.id < next) throw std::invalid_argument("request_id must be larger than every one before it");
  } while (!next_id_.compare_exchange_weak(next, request.id + 1));
  if (!inbox_.post(std::move(request))) throw std::runtime_error("the engine has stopped: " + stats().error);
}

Stats Engine::stats() const {
  const std::lock_guard lock(stats_mutex_);
  return stats_;
}

void Engine::run() {
  std::string error;
  try {
    loop();
    scheduler_->check_integrity();
  } catch (const std::exception& e) {
    error = e.what();
  }
  // Nothing that was asked is left without an answer, whatever ended the loop.
  inbox_.close();
  masks_.close();
  while (auto rest = inbox_.take(/*wait=*/false))
    for (Letter& letter : *rest)
      if (auto* request = std::get_if<Request>(&letter)) scheduler_->submit(std::move(*request));
  std::vector<Event> last = scheduler_->fail_all();
  {
    const std::lock_guard lock(stats_mutex_);
    scheduler_->fill(stats_);
    stats_.alive = false;
    stats_.error = error;
  }
  outbox_.post(std::move(last));
}

void Engine::loop() {
  while (auto mail = inbox_.take(/*wait=*/!scheduler_->busy())) {
    for (Letter& letter : *mail) apply(std::move(letter));
    if (!scheduler_->busy()) {
      publish_stats();  // a cancel may have emptied the house
      continue;
    }
    const Step step = scheduler_->schedule(now());
    Batch batch = make_batch(step);
    masks_.post(step, batch);
    float* logits = transformer_->forward(batch);
    if (!masks_.collect()) return;  // stopped
    std::vector<Sampled> next(batch.sampling.size());
    device_->sample(logits, config_.vocab_size, batch.sampling, next);
    std::vector<TokenLogprobs> scored = score(batch);
    pool(step, batch);
    std::vector<Event> events = scheduler_->commit(step, next, scored, now());
    publish_stats();  // first, so that whoever has a request's last event sees it gone
    outbox_.post(std::move(events));
  }
}

// In pieces: a step may score as many rows as it has tokens, and a row of logits is wide.
std::vector<TokenLogprobs> Engine::score(const Batch& batch) {
  std::vector<TokenLogprobs> scored(batch.scoring.size());
  const auto most = static_cast<size_t>(transformer_->max_logits());
  for (size_t i = 0; i < scored.size(); i += most) {
    const size_t n = std::min(most, scored.size() - i);
    float* logits = transformer_->logits(std::span(batch.scoring_rows).subspan(i, n));
    device_->score(logits, config_.vocab_size, std::span(batch.scoring).subspan(i, n),
                   std::span(scored).subspan(i, n));
  }
  return scored;
}

// Adds the states that pooling wants to their sequences, in pieces as well: in f64 and the order of the
// tokens, so a sum does not depend on where a step or a piece ends.
void Engine::pool(const Step& step, const Batch& batch) {
  std::vector<Sequence*> owners;  // (num_pooled)
  for (const ScheduledSequence& scheduled : step)
    owners.insert(owners.end(), static_cast<size_t>(pooled_range(scheduled).size()), scheduled.sequence);
  const auto width = static_cast<size_t>(config_.hidden_size),
             most = static_cast<size_t>(transformer_->max_logits());
  std::vector<float> states;  // (at most max_logits, hidden_size)
  for (size_t i = 0; i < owners.size(); i += most) {
    const size_t n = std::min(most, owners.size() - i);
    states.resize(n * width);
    device_->copy_to_host(states.data(), transformer_->hidden(std::span(batch.pooling_rows).subspan(i, n)),
                          states.size());
    for (size_t row = 0; row < n; ++row) {
      std::vector<double>& sum = owners[i + row]->pooled;
      sum.resize(width);
      for (size_t j = 0; j < width; ++j) sum[j] += double{states[row * width + j]};
    }
  }
}

void Engine::apply(Letter letter) {
  if (auto* request = std::get_if<Request>(&letter))
    scheduler_->submit(std::move(*request));
  else if (std::holds_alternative<ForgetPrefixes>(letter))
    scheduler_->forget_prefixes();
  else if (auto aborted = scheduler_->cancel(std::get<Cancel>(letter).id))
    outbox_.post({std::move(*aborted)});
}

void Engine::publish_stats() {
  const std::lock_guard lock(stats_mutex_);
  scheduler_->fill(stats_);
  stats_.last_step_time = now();
}

}  // namespace engine
