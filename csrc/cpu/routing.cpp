#include "cpu/routing.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "cpu/pointwise.h"

namespace engine {
namespace {

// The numbers of the largest scores, largest first, of equal ones the lower number first. Where scores are
// NaN, some numbers.
void find_largest(std::span<const float> scores, std::span<int32_t> numbers) {
  const auto score = [&](int32_t number) { return scores[static_cast<size_t>(number)]; };
  for (int32_t e = 0; e < static_cast<int32_t>(scores.size()); ++e) {
    size_t at = std::min(static_cast<size_t>(e), numbers.size());
    for (; at > 0 && score(e) > score(numbers[at - 1]); --at)
      if (at < numbers.size()) numbers[at] = numbers[at - 1];
    if (at < numbers.size()) numbers[at] = e;
  }
}

size_t num_choices(const ModelConfig& config, int max_tokens) {
  return static_cast<size_t>(max_tokens) * static_cast<size_t>(config.num_experts_per_tok);
}

}  // namespace

CpuRouting::CpuRouting(const ModelConfig& config, int max_tokens)
    : per_row_(static_cast<size_t>(config.num_experts_per_tok)),
      first_choices_(static_cast<size_t>(config.num_experts) + 1),
      rows_(num_choices(config, max_tokens)),
      experts_(rows_.size()),
      choices_(rows_.size()),
      shares_(rows_.size()) {}

size_t CpuRouting::bytes(const ModelConfig& config, int max_tokens) {
  return num_choices(config, max_tokens) * (3 * sizeof(int32_t) + sizeof(float));
}

void CpuRouting::choose(const ModelConfig& config, const Kernels& kernels, const float* scores, size_t first,
                        size_t count) {
  check((first + count) * per_row_ <= rows_.size(), "route: the rows fit the routing");
  std::vector<float> exponentials(static_cast<size_t>(config.num_experts));
  for (size_t row = first; row < first + count; ++row) {
    const std::span row_scores{scores + row * exponentials.size(), exponentials.size()};
    const std::span experts{&experts_[row * per_row_], per_row_};
    find_largest(row_scores, experts);
    const float largest = row_scores[static_cast<size_t>(experts[0])];
    kernels.pointwise->exp(row_scores.data(), largest, 1, exponentials.data(), exponentials.size());
    const std::span shares{&shares_[row * per_row_], per_row_};
    for (size_t j = 0; j < per_row_; ++j) shares[j] = exponentials[static_cast<size_t>(experts[j])];
    const std::span<const float> parts = config.norm_topk_prob ? shares : std::span<float>(exponentials);
    const float sum = std::accumulate(parts.begin(), parts.end(), 0.0f);
    for (float& share : shares) share /= sum;
  }
}

// A counting sort: it keeps the order of the rows.
void CpuRouting::sort(int n) {
  n_ = n;
  const std::span experts{experts_.data(), static_cast<size_t>(n) * per_row_};
  std::ranges::fill(first_choices_, 0);
  for (const int32_t expert : experts) ++first_choices_[static_cast<size_t>(expert) + 1];
  std::partial_sum(first_choices_.begin(), first_choices_.end(), first_choices_.begin());
  std::vector<int32_t> next(first_choices_.begin(), first_choices_.end() - 1);
  for (size_t i = 0; i < experts.size(); ++i) {
    choices_[i] = next[static_cast<size_t>(experts[i])]++;
    rows_[static_cast<size_t>(choices_[i])] = static_cast<int32_t>(i / per_row_);
  }
}

}  // namespace engine
