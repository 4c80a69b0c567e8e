// Which tokens the constraints of a step's rows allow. They depend only on tokens that are known already, so
// they are worked out beside the forward: the engine thread posts what it needs to know before it, whoever
// knows the constraints (Python) answers meanwhile, and the engine thread collects the answers before it
// samples.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device/batch.h"
#include "engine/scheduler.h"

namespace engine {

// What one constrained row needs to know: which tokens may follow.
struct MaskDemand {
  uint64_t request_id = 0;
  std::vector<int32_t> tokens;  // appended to the answer since this request's last demand
  uint32_t* mask = nullptr;     // to be filled: bit i % 32 of word i / 32 allows token i; all 0 at first
};

// One of: tokens that must come next, then `mask` stays as it is; why the constraint cannot go on; or
// neither, and `mask` is filled.
struct MaskAnswer {
  std::vector<int32_t> forced;
  std::string error;
};

// The engine thread calls post() and collect(), in turns; one other thread calls wait() and answer().
class MaskDesk {
 public:
  explicit MaskDesk(int32_t vocab_size) : vocab_size_(vocab_size), words_((size_t(vocab_size) + 31) / 32) {}

  // Points the constrained rows of the batch to masks, and demands those that are not decided already.
  void post(const Step& step, Batch& batch);
  // Waits for the answers and hands them to the sequences. False when closed meanwhile.
  bool collect();

  // The demands of a step, once it has any; nullopt when closed.
  std::optional<std::vector<MaskDemand>> wait();
  // One answer for each demand, in their order. Throws std::invalid_argument when they do not fit.
  void answer(std::vector<MaskAnswer> answers);
  void close();  // nobody waits any more; from any thread, any number of times

 private:
  struct Row {
    Sequence* sequence;
    uint32_t* mask;
    bool demanded;  // otherwise its sequence knows the next token already
  };

  void take(Row& row, MaskAnswer answer) const;

  const int32_t vocab_size_;
  const size_t words_;                        // of a mask
  std::deque<std::vector<uint32_t>> buffer_;  // a mask for each row; they never move
  std::vector<Row> rows_;                     // of the step under way

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<MaskDemand> demands_;
  std::vector<MaskAnswer> answers_;
  size_t num_asked_ = 0;  // demands that wait() has handed out and answer() has not settled
  bool closed_ = false;
};

}  // namespace engine
