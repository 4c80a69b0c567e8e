#include "cpu/linear.h"

#include <algorithm>

#include "base/check.h"
#include "cpu/packed_weight.h"

namespace engine {
namespace {

constexpr int64_t kTasksPerThread = 4;              // so that the slowest thread leaves little to wait for
constexpr int64_t kTaskBytes = int64_t{512} << 10;  // of activations: they stay in the second-level cache
constexpr int kExpandCols = 128;                    // columns that embed() expands at a time

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How panels [0, num_panels) are cut into runs: evenly, and in pairs, which a kernel takes at once.
struct Division {
  int64_t num_panels;
  int64_t num_runs;
  Division(int64_t panels, int threads)
      : num_panels(panels), num_runs(std::min(ceil_div(panels, 2), threads * kTasksPerThread)) {}
  int64_t first(int64_t run) const {
    return std::min(num_panels, run * ceil_div(num_panels, 2) / num_runs * 2);
  }
};

// Row tiles that one task multiplies: enough to pay for reading, or expanding, the weights.
int64_t tiles_per_task(int64_t cols) {
  return std::max<int64_t>(1,
                           kTaskBytes / (ceil_div(cols, 32) * static_cast<int64_t>(sizeof(QuantisedTile))));
}

// What panels [first, last) of one segment are to a row of y.
LinearTask panels_of(const PackedWeight& weight, const Segment& segment, int64_t first, int64_t last) {
  const int64_t row = first * kLanes;
  const int64_t channels = std::min(last * kLanes, segment.rows) - row;
  LinearTask task{};
  task.format = segment.format;
  task.panels = weight.panel(segment, first);
  task.panel_bytes = segment.panel_bytes;
  task.num_panels = static_cast<int>(last - first);
  task.num_channels = static_cast<int>(channels);
  task.cols = weight.cols;
  task.bias = weight.bias.empty() ? nullptr : weight.bias.data() + segment.first_row + row;
  task.y_stride = weight.rows;
  return task;
}

// What is multiplied, in both forms.
struct Input {
  const float* x;                  // (n, cols)
  const QuantisedTile* quantised;  // (row tiles, cols / 32); null where no weight takes it
  int n;
};

// Row tiles [first_tile, last_tile) of y in the channels of panels [first, last), which may lie in several
// segments.
void multiply(const Kernels& kernels, const PackedWeight& weight, int64_t first, int64_t last,
              const Input& in, float* y, int first_tile, int last_tile) {
  const int first_row = first_tile * kRowTile, last_row = std::min(last_tile * kRowTile, in.n);
  for (const Segment& s : weight.segments) {
    const int64_t begin = std::max<int64_t>(first - s.first_panel, 0);
    const int64_t end = std::min(last - s.first_panel, s.num_panels);
    if (begin >= end) continue;
    LinearTask task = panels_of(weight, s, begin, end);
    task.x = in.x + first_row * weight.cols;
    if (s.arithmetic == Arithmetic::INT8) task.quantised = in.quantised + first_tile * (weight.cols / 32);
    task.y = y + first_row * weight.rows + s.first_row + begin * kLanes;
    task.num_rows = last_row - first_row;
    kernels.linear->multiply(task);
  }
}

// Null where every segment is multiplied exactly.
const QuantisedTile* quantise(const Kernels& kernels, ThreadPool& pool, const PackedWeight& weight,
                              const float* x, int n, QuantisedRows& out) {
  if (!weight.takes_int8()) return nullptr;
  const int64_t tiles = ceil_div(n, kRowTile), groups = weight.cols / 32;
  if (out.size() < static_cast<size_t>(tiles * groups)) out.resize(static_cast<size_t>(tiles * groups));
  pool.run(static_cast<int>(tiles), [&](int tile, int) {
    const int row = tile * kRowTile;
    kernels.linear->quantise(x + row * weight.cols, weight.cols, std::min(kRowTile, n - row),
                             out.data() + tile * groups);
  });
  return out.data();
}

}  // namespace

void linear(const Kernels& kernels, ThreadPool& pool, const Weight& weight, const float* x, float* y, int n,
            QuantisedRows& scratch) {
  const auto& packed = static_cast<const PackedWeight&>(weight);
  const Input in{x, quantise(kernels, pool, packed, x, n, scratch), n};
  const Division panels(packed.num_panels, pool.size());
  const int64_t tiles = ceil_div(n, kRowTile), row_runs = ceil_div(tiles, tiles_per_task(packed.cols));
  pool.run(static_cast<int>(panels.num_runs * row_runs), [&](int task, int) {
    const int64_t run = task % panels.num_runs, row_run = task / panels.num_runs;
    const int first_tile = static_cast<int>(row_run * tiles / row_runs);
    const int last_tile = static_cast<int>((row_run + 1) * tiles / row_runs);
    multiply(kernels, packed, panels.first(run), panels.first(run + 1), in, y, first_tile, last_tile);
  });
}

void embed(const Kernels& kernels, const Weight& table, std::span<const int32_t> tokens, float* out) {
  const auto& packed = static_cast<const PackedWeight&>(table);
  check(packed.segments.size() == 1, "an embedding table has one source");
  const Segment& segment = packed.segments[0];
  alignas(64) float expanded[kExpandCols * kLanes];
  for (const int32_t token : tokens) {
    check(token >= 0 && token < table.rows, "token id out of range");
    const std::byte* panel = packed.panel(segment, token / kLanes);
    for (int64_t begin = 0; begin < table.cols; begin += kExpandCols) {
      const int64_t end = std::min(begin + kExpandCols, table.cols);
      kernels.linear->expand(segment.format, panel, begin, end, expanded);
      for (int64_t k = 0; k < end - begin; ++k) *out++ = expanded[kLanes * k + token % kLanes];
    }
  }
}

}  // namespace engine
