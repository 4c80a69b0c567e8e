#include "cuda/step.h"

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "cuda/parcel.h"

namespace engine::cuda {
namespace {

// -1 for tokens of no sequence.
std::vector<int64_t> slots_of(const Batch& batch) {
  std::vector<int64_t> slots;
  for (const BatchSequence& s : batch.sequences)
    for (int32_t i = s.num_computed; i < s.num_computed + s.num_tokens; ++i)
      slots.push_back(int64_t{batch.block_tables[static_cast<size_t>(s.first_block + i / kBlockSize)]} *
                          kBlockSize +
                      i % kBlockSize);
  slots.resize(batch.tokens.size(), -1);
  return slots;
}

bool same_place(const Batch& a, const Batch& b) {
  const auto equal = [](const BatchSequence& x, const BatchSequence& y) {
    return x.first_token == y.first_token && x.num_tokens == y.num_tokens &&
           x.num_computed == y.num_computed && x.first_block == y.first_block;
  };
  return a.positions == b.positions && a.block_tables == b.block_tables &&
         std::ranges::equal(a.sequences, b.sequences, equal);
}

int group_of(const ModelConfig& config) {
  return config.num_attention_heads / config.num_key_value_heads;
}

size_t state_bytes(const ModelConfig& config) {  // of a partition
  return static_cast<size_t>(config.num_key_value_heads) * partial_numbers(config.head_dim) * sizeof(float);
}

}  // namespace

int window_of(const ModelConfig& config, int layer) {
  return config.sliding_window.empty() ? 0 : config.sliding_window[static_cast<size_t>(layer)];
}

void StagedStep::reserve(const ModelConfig& config, int max_tokens, int64_t max_blocks,
                         const SplitLimits& limits) {
  const auto tokens = static_cast<size_t>(max_tokens), partials = static_cast<size_t>(limits.max_partials);
  // A sequence's last tile may be a part of one.
  const size_t tiles = tokens + tokens * static_cast<size_t>(group_of(config)) / kTileRows;
  const size_t of_plan = tiles * (sizeof(AttentionTile) + sizeof(int32_t)) +
                         (tiles + partials) * sizeof(AttentionPiece) + 3 * Parcel::kAlignment;
  std::vector<int> windows;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) windows.push_back(window_of(config, layer));
  std::ranges::sort(windows);
  const auto repeated = std::ranges::unique(windows);
  const size_t num_windows = windows.size() - repeated.size();
  const size_t of_batch = tokens * (3 * sizeof(int32_t) + sizeof(int64_t)) +
                          static_cast<size_t>(max_blocks) * sizeof(int32_t) + 5 * Parcel::kAlignment;
  memory_.reserve(2 * (of_batch + num_windows * of_plan));  // at most doubled by padding
  partials_.reserve(partials * state_bytes(config));
}

void StagedStep::bring(cudaStream_t stream, const ModelConfig& config, const Batch& batch,
                       const SplitLimits& limits, bool padded) {
  largest_block_ = check_tables(batch);
  config_ = &config;
  batch_ = batch;
  if (padded) {
    const size_t n = std::bit_ceil(batch.tokens.size());
    for (auto* indices : {&batch_.tokens, &batch_.positions, &batch_.logit_rows}) indices->resize(n);
  }
  Parcel parcel(padded);
  tokens_ = parcel.add(batch_.tokens);
  positions_ = parcel.add(batch_.positions);
  slots_ = parcel.add(slots_of(batch_), int64_t{-1});
  rows_ = parcel.add(batch_.logit_rows);
  tables_ = parcel.add(batch_.block_tables);
  on_device_ = {.num_tokens = batch_.num_tokens(), .num_block_entries = parcel.last_room()};
  plans_.clear();
  int num_partials = 0;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    const int window = window_of(config, layer);
    if (std::ranges::find(plans_, window, &WindowPlan::window) != plans_.end()) continue;
    const AttentionPlan plan = plan_attention(batch_, group_of(config), config.num_key_value_heads, window,
                                              limits.enough_blocks, limits.max_partials);
    WindowPlan& staged = plans_.emplace_back(WindowPlan{window, 0, 0, 0, {}});
    staged.tiles = parcel.add(plan.tiles);
    staged.on_device.num_tiles = parcel.last_room();
    staged.pieces = parcel.add(plan.pieces, AttentionPiece{-1, 0, 0});
    staged.on_device.num_pieces = parcel.last_room();
    staged.split_tiles = parcel.add(plan.split_tiles, -1);
    staged.on_device.num_split = parcel.last_room();
    num_partials = std::max(num_partials, plan.num_partials);
  }
  parcel.send(memory_, stream);
  shape_ = parcel.rooms();
  shape_.push_back(reinterpret_cast<intptr_t>(&config));
  locate(config, num_partials);
}

void StagedStep::locate(const ModelConfig& config, int num_partials) {
  partials_.reserve(static_cast<size_t>(num_partials) * state_bytes(config));
  on_device_.positions = at<int32_t>(memory_, positions_);
  on_device_.slots = at<int64_t>(memory_, slots_);
  on_device_.block_tables = at<int32_t>(memory_, tables_);
  for (WindowPlan& plan : plans_) {
    plan.on_device.tiles = at<AttentionTile>(memory_, plan.tiles);
    plan.on_device.pieces = at<AttentionPiece>(memory_, plan.pieces);
    plan.on_device.split_tiles = at<int32_t>(memory_, plan.split_tiles);
    plan.on_device.partials = partials_.as<float>();
    plan.on_device.partial_numbers = partials_.bytes() / sizeof(float);
  }
}

bool StagedStep::holds(const ModelConfig& config, const Batch& batch) const {
  return config_ == &config && (&batch == &batch_ || same_place(batch, batch_));
}

const DevicePlan& StagedStep::plan(int window) const {
  const auto found = std::ranges::find(plans_, window, &WindowPlan::window);
  check(found != plans_.end(), "attention of a layer's window is planned");
  return found->on_device;
}

const int32_t* StagedStep::find(std::span<const int32_t> indices) const {
  if (indices.data() == batch_.tokens.data()) return at<int32_t>(memory_, tokens_);
  if (indices.data() == batch_.logit_rows.data()) return at<int32_t>(memory_, rows_);
  return nullptr;
}

}  // namespace engine::cuda
