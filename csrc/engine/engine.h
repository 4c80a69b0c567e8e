// The engine: one thread, one loop, two mailboxes.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "device/device.h"
#include "engine/mailbox.h"
#include "engine/masks.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "model/transformer.h"

namespace engine {

class Engine {
 public:
  // Loads the weights (Loading shows how far it is), sizes the cache and starts the thread.
  Engine(const ModelConfig& config, const TensorIndex& tensors, const EngineOptions& options,
         Loading& loading);
  ~Engine();  // stop()

  // Throws std::invalid_argument naming the parameter when the request can never run, std::runtime_error when
  // the engine has stopped.
  void submit(Request request);
  // Takes effect before the next step; the request's last event is an ABORT. Unknown ids are ignored.
  void cancel(uint64_t id) { inbox_.post(Cancel{id}); }
  // Empties the prefix cache of what no live request holds, before the next step.
  void forget_prefixes() { inbox_.post(ForgetPrefixes{}); }
  int fileno() const { return outbox_.fileno(); }
  std::vector<Event> drain() { return outbox_.drain(); }
  Stats stats() const;
  // Somebody must answer its demands while constrained requests run.
  MaskDesk& masks() { return masks_; }
  void stop();  // ends open requests and returns when the thread has; from any thread, any number of times

  const EngineOptions& options() const { return options_; }  // with max_model_len filled in
  size_t weight_bytes() const { return weight_bytes_; }
  std::string device_name() const { return device_->name(); }

 private:
  void run();  // the thread: loop(), and whatever ends it, an answer to everyone
  void loop();
  void apply(Letter letter);
  std::vector<TokenLogprobs> score(const Batch& batch);
  void pool(const Step& step, const Batch& batch);
  void publish_stats();

  EngineOptions options_;
  ModelConfig config_;
  size_t weight_bytes_ = 0;
  int64_t cache_tokens_ = 0;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Transformer> transformer_;
  std::unique_ptr<Scheduler> scheduler_;
  std::atomic<uint64_t> next_id_ = 0;  // ids only grow, so no two live requests share one
  Inbox inbox_;
  Outbox outbox_;
  MaskDesk masks_;
  mutable std::mutex stats_mutex_;
  Stats stats_;
  std::thread thread_;
  std::once_flag joined_;
};

}  // namespace engine
