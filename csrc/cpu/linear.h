// y = x · Wᵀ + bias with weights that stay in their stored format: packed once into panels (panel.h),
// expanded to exactly the numbers of dequantize_row() while they are multiplied.
//
// Every output is one chain of multiply-adds over the columns in order, starting at the bias. So it depends
// neither on the number of rows or threads, nor on whether AVX2 or AVX-512 runs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/tensor.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "device/device.h"

namespace engine {

// One thread's share: a run of panels times a run of rows.
struct LinearTask {
  Format format;
  const std::byte* panels;  // (num_panels, panel_bytes)
  size_t panel_bytes;
  int num_panels;    // at most kTaskPanels
  int num_channels;  // of the panels' 16 · num_panels that exist
  int64_t cols;
  const float* bias;  // (num_channels) or null
  const float* x;     // (num_rows, cols)
  int num_rows;
  float* y;  // (num_rows, num_channels), rows y_stride apart
  int64_t y_stride;
};

inline constexpr int kTaskPanels = 4;

struct LinearKernels {
  void (*multiply)(const LinearTask& task);
  // out (end - begin, 16): columns begin to end of one panel, as floats. Both ends are multiples of 32, or of
  // 1 for plain floats.
  void (*expand)(Format format, const std::byte* panel, int64_t begin, int64_t end, float* out);
};

// The sources stacked by rows, each in its own format. They agree in `cols`; `bias` has one number per row or
// is empty.
std::unique_ptr<Weight> pack_weight(ThreadPool& pool, std::span<const Tensor> sources,
                                    std::span<const float> bias);

// y (n, weight.rows) = x (n, weight.cols) · weightᵀ + bias.
void linear(const Kernels& kernels, ThreadPool& pool, const Weight& weight, const float* x, float* y, int n);

// out (tokens.size(), table.cols): rows of `table`, bit for bit as dequantize_row() gives them, without the
// bias.
void embed(const Kernels& kernels, const Weight& table, std::span<const int32_t> tokens, float* out);

}  // namespace engine
