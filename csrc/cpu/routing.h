// Which experts rows go to, on the CPU.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/kernels.h"
#include "device/device.h"

namespace engine {

// The choices stand by expert, and each expert's in the order of the rows.
class CpuRouting : public Routing {
 public:
  CpuRouting(const ModelConfig& config, int max_tokens);
  static size_t bytes(const ModelConfig& config, int max_tokens);

  // Chooses for rows [first, first + count) of scores (n, num_experts); then, all n being chosen for, sorts.
  void choose(const ModelConfig& config, const Kernels& kernels, const float* scores, size_t first,
              size_t count);
  void sort(int n);

  int n() const { return n_; }
  int per_row() const { return static_cast<int>(per_row_); }
  // (num_experts + 1): where each one's choices begin.
  std::span<const int32_t> first_choices() const { return first_choices_; }
  size_t row_of(size_t choice) const { return static_cast<size_t>(rows_[choice]); }
  // (per_row): where a row's choices stand, the one with the largest score first, and their shares.
  std::span<const int32_t> choices_of(size_t row) const { return {&choices_[row * per_row_], per_row_}; }
  std::span<const float> shares_of(size_t row) const { return {&shares_[row * per_row_], per_row_}; }

 private:
  size_t per_row_;
  int n_ = 0;
  std::vector<int32_t> first_choices_;
  std::vector<int32_t> rows_;               // (choices)
  std::vector<int32_t> experts_, choices_;  // (n, per_row)
  std::vector<float> shares_;               // (n, per_row)
};

}  // namespace engine
