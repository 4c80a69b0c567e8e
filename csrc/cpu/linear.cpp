#include "cpu/linear.h"

#include <algorithm>

#include "base/check.h"
#include "cpu/packed_weight.h"

namespace engine {
namespace {

constexpr int64_t kTasksPerThread = 4;              // so that the slowest thread leaves little to wait for
constexpr int64_t kTaskBytes = int64_t{512} << 10;  // of activations: they stay in the second-level cache
constexpr int64_t kBf16TaskBytes = 2 * kTaskBytes;  // weights of two bytes are read half as fast as bytes
constexpr int kExpandCols = 128;                    // columns that embed() expands at a time

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Rows of x and the panels that they are multiplied with: a whole weight's, or an expert's. The panels are
// cut evenly into runs, and in pairs, which a kernel takes at once; the row tiles into as few runs as pay for
// reading, or expanding, the weights.
struct Part {
  int first_row, num_rows;          // of x and of y
  int64_t first_panel, num_panels;  // of the weight
  int64_t first_channel;            // of the weight, the first one in a row of y
  int64_t panel_runs = 0, row_runs = 0;
  int64_t first_tile = 0;  // of the quantised rows, those of the parts before it counted
  int64_t first_task = 0;  // likewise

  int64_t num_tiles() const { return ceil_div(num_rows, kRowTile); }
  int64_t num_tasks() const { return panel_runs * row_runs; }
  void cut(int64_t tiles_per_task, int threads) {
    panel_runs = std::min(ceil_div(num_panels, 2), threads * kTasksPerThread);
    row_runs = ceil_div(num_tiles(), tiles_per_task);
  }
  // Where a run begins.
  int64_t panel(int64_t run) const {
    return first_panel + std::min(num_panels, run * ceil_div(num_panels, 2) / panel_runs * 2);
  }
  int64_t tile(int64_t run) const { return run * num_tiles() / row_runs; }
};

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
  return task;
}

// What is multiplied, in each form that a segment takes, and what comes out.
struct Operands {
  const float* x;               // (rows, cols)
  const QuantisedTile* groups;  // (row tiles of the parts, cols / 32)
  const RowTile* rows;          // (row tiles of the parts, RowTile::units(cols))
  const Bf16Tile* bf16;         // (row tiles of the parts, ⌈cols / 32⌉)
  float* y;                     // (rows, y_stride)
  int64_t y_stride;
};

// Row tiles [first_tile, last_tile) of a part in the channels of panels [first, last), which may lie in
// several segments.
void multiply(const Kernels& kernels, const PackedWeight& weight, const Part& part, int64_t first,
              int64_t last, const Operands& o, int64_t first_tile, int64_t last_tile) {
  const int64_t row = first_tile * kRowTile, end_row = std::min<int64_t>(last_tile * kRowTile, part.num_rows);
  auto s = std::ranges::upper_bound(weight.segments, first, {}, &Segment::first_panel) - 1;
  for (; s != weight.segments.end() && s->first_panel < last; ++s) {
    const int64_t begin = std::max<int64_t>(first - s->first_panel, 0);
    LinearTask task = panels_of(weight, *s, begin, std::min(last - s->first_panel, s->num_panels));
    task.x = o.x + (part.first_row + row) * weight.cols;
    const int64_t tile = part.first_tile + first_tile;
    const Activations form = s->activations();
    if (form == Activations::GROUPS) task.quantised = o.groups + tile * (weight.cols / 32);
    if (form == Activations::ROWS) task.by_row = o.rows + tile * RowTile::units(weight.cols);
    if (form == Activations::BF16 && kernels.linear->round_to_bf16)
      task.bf16 = o.bf16 + tile * ceil_div(weight.cols, 32);
    task.y = o.y + (part.first_row + row) * o.y_stride + s->first_row - part.first_channel + begin * kLanes;
    task.y_stride = o.y_stride;
    task.num_rows = static_cast<int>(end_row - row);
    kernels.linear->multiply(task);
  }
}

// The part that has the tile or task number `index`; those of the parts are numbered one after the other.
const Part& part_with(std::span<const Part> parts, int64_t Part::* first, int64_t index) {
  return *(std::ranges::upper_bound(parts, index, {}, first) - 1);
}

template <class T>
void grow(std::vector<T>& to, int64_t size) {
  if (static_cast<int64_t>(to.size()) < size) to.resize(static_cast<size_t>(size));
}

bool takes_bf16(const Kernels& kernels, const PackedWeight& weight) {
  return kernels.linear->round_to_bf16 && weight.takes(Activations::BF16);
}

// Row tiles of a task: enough to pay for reading, or expanding, the weights.
int64_t tiles_per_task(const Kernels& kernels, const PackedWeight& weight) {
  const int64_t tiles = takes_bf16(kernels, weight)
                            ? kBf16TaskBytes / static_cast<int64_t>(sizeof(Bf16Tile))
                            : kTaskBytes / static_cast<int64_t>(sizeof(QuantisedTile));
  return std::max<int64_t>(1, tiles / ceil_div(weight.cols, 32));
}

// Each part's rows in tiles of their own, in the forms that the weight takes.
void round_rows(const Kernels& kernels, ThreadPool& pool, const PackedWeight& weight, std::span<Part> parts,
                const float* x, RoundedRows& out) {
  const bool groups = weight.takes(Activations::GROUPS), rows = weight.takes(Activations::ROWS);
  const bool bf16 = takes_bf16(kernels, weight);
  if (!groups && !rows && !bf16) return;
  int64_t tiles = 0;
  for (Part& part : parts) {
    part.first_tile = tiles;
    tiles += part.num_tiles();
  }
  const int64_t cols = weight.cols, num_groups = ceil_div(cols, 32), units = RowTile::units(cols);
  if (groups) grow(out.groups, tiles * num_groups);
  if (rows) grow(out.rows, tiles * units);
  if (rows) grow(out.rotated, pool.size() * cols);
  if (bf16) grow(out.bf16, tiles * num_groups);
  pool.run(static_cast<int>(tiles), [&](int tile, int worker) {
    const Part& part = part_with(parts, &Part::first_tile, tile);
    const int row = static_cast<int>(tile - part.first_tile) * kRowTile;
    const int num_rows = std::min(kRowTile, part.num_rows - row);
    const float* from = x + (part.first_row + row) * cols;
    if (groups) kernels.linear->quantise(from, cols, num_rows, out.groups.data() + tile * num_groups);
    if (rows)
      kernels.linear->quantise_rows(from, cols, num_rows, out.rotated.data() + worker * cols,
                                    out.rows.data() + tile * units);
    if (bf16) kernels.linear->round_to_bf16(from, cols, num_rows, out.bf16.data() + tile * num_groups);
  });
}

// y (rows, channels of a part) = x · wᵀ + bias, part by part, in one run of the pool.
void multiply(const Kernels& kernels, ThreadPool& pool, const PackedWeight& weight, std::span<Part> parts,
              const float* x, float* y, int64_t y_stride, RoundedRows& scratch) {
  round_rows(kernels, pool, weight, parts, x, scratch);
  const Operands operands{x, scratch.groups.data(), scratch.rows.data(), scratch.bf16.data(), y, y_stride};
  int64_t tasks = 0;
  for (Part& part : parts) {
    part.cut(tiles_per_task(kernels, weight), pool.size());
    part.first_task = tasks;
    tasks += part.num_tasks();
  }
  pool.run(static_cast<int>(tasks), [&](int task, int) {
    const Part& part = part_with(parts, &Part::first_task, task);
    const int64_t run = (task - part.first_task) % part.panel_runs;
    const int64_t row_run = (task - part.first_task) / part.panel_runs;
    multiply(kernels, weight, part, part.panel(run), part.panel(run + 1), operands, part.tile(row_run),
             part.tile(row_run + 1));
  });
}

}  // namespace

void linear(const Kernels& kernels, ThreadPool& pool, const Weight& weight, const float* x, float* y, int n,
            RoundedRows& scratch) {
  const auto& packed = static_cast<const PackedWeight&>(weight);
  Part whole{0, n, 0, packed.num_panels, 0};
  multiply(kernels, pool, packed, {&whole, 1}, x, y, packed.rows, scratch);
}

void linear_experts(const Kernels& kernels, ThreadPool& pool, const Weight& weight,
                    std::span<const int32_t> first_rows, const float* x, float* y, RoundedRows& scratch) {
  const auto& packed = static_cast<const PackedWeight&>(weight);
  const auto num_experts = static_cast<int64_t>(first_rows.size()) - 1;
  check(packed.rows % num_experts == 0, "experts have equally many rows");
  const int64_t channels = packed.rows / num_experts;
  const auto first_panel = [&](int64_t expert) {
    if (expert == num_experts) return packed.num_panels;
    const auto s = std::ranges::lower_bound(packed.segments, expert * channels, {}, &Segment::first_row);
    check(s != packed.segments.end() && s->first_row == expert * channels,
          "no source belongs to two experts");
    return s->first_panel;
  };
  std::vector<Part> parts;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int32_t row = first_rows[static_cast<size_t>(e)], end = first_rows[static_cast<size_t>(e) + 1];
    if (row < end)
      parts.push_back({row, end - row, first_panel(e), first_panel(e + 1) - first_panel(e), e * channels});
  }
  multiply(kernels, pool, packed, parts, x, y, channels, scratch);
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
