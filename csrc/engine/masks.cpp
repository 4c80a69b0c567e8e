#include "engine/masks.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "base/check.h"

namespace engine {

void MaskDesk::post(const Step& step, Batch& batch) {
  rows_.clear();
  std::vector<MaskDemand> demands;
  size_t logit_row = 0;
  for (const ScheduledSequence& scheduled : step) {
    if (!samples(scheduled)) continue;
    SamplingRow& sampling = batch.sampling.at(logit_row++);
    Sequence& sequence = *scheduled.sequence;
    if (!sequence.params.constrained) continue;
    if (buffer_.size() == rows_.size()) buffer_.emplace_back(words_);
    std::vector<uint32_t>& mask = buffer_[rows_.size()];
    std::ranges::fill(mask, 0u);
    sampling.mask = mask.data();
    rows_.push_back({&sequence, mask.data(), sequence.forced.empty()});
    if (!rows_.back().demanded) continue;
    const auto told = std::exchange(sequence.num_told, sequence.size());
    demands.push_back({sequence.id, {sequence.tokens.begin() + told, sequence.tokens.end()}, mask.data()});
  }
  if (demands.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    demands_ = std::move(demands);
  }
  changed_.notify_all();
}

bool MaskDesk::collect() {
  const auto demanded = static_cast<size_t>(std::ranges::count_if(rows_, &Row::demanded));
  std::vector<MaskAnswer> answers;
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return closed_ || answers_.size() == demanded; });
    if (closed_ && answers_.size() != demanded) return false;
    answers = std::exchange(answers_, {});
  }
  size_t next = 0;
  for (Row& row : rows_) take(row, row.demanded ? std::move(answers[next++]) : MaskAnswer{});
  return true;
}

// A row whose next token is known gets a mask that allows no other, so the sampler need not know of it.
void MaskDesk::take(Row& row, MaskAnswer answer) const {
  Sequence& sequence = *row.sequence;
  const auto outside = [this](int32_t token) { return token < 0 || token >= vocab_size_; };
  if (row.demanded) {
    sequence.error = std::move(answer.error);
    sequence.forced.assign(answer.forced.begin(), answer.forced.end());
    if (std::ranges::any_of(sequence.forced, outside))
      sequence.error = "the constraint forces a token that is not in the vocabulary";
    else if (sequence.error.empty() && sequence.forced.empty() &&
             std::all_of(row.mask, row.mask + words_, [](uint32_t word) { return word == 0; }))
      sequence.error = "the constraint allows no token at all";
  }
  if (!sequence.error.empty())
    std::fill_n(row.mask, words_, ~0u);  // what is sampled is not used
  else if (!sequence.forced.empty())
    row.mask[sequence.forced.front() / 32] = 1u << (sequence.forced.front() % 32);
}

std::optional<std::vector<MaskDemand>> MaskDesk::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return closed_ || !demands_.empty(); });
  if (closed_) return std::nullopt;
  num_asked_ = demands_.size();
  return std::exchange(demands_, {});
}

void MaskDesk::answer(std::vector<MaskAnswer> answers) {
  {
    const std::lock_guard lock(mutex_);
    if (answers.size() != num_asked_)
      throw std::invalid_argument(std::to_string(answers.size()) + " answers to " +
                                  std::to_string(num_asked_) + " demands for masks");
    num_asked_ = 0;
    answers_ = std::move(answers);
  }
  changed_.notify_all();
}

void MaskDesk::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
}

}  // namespace engine
