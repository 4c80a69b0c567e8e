#include <algorithm>

#include "cuda/attention.h"

namespace engine::cuda {
namespace {

int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

}  // namespace

AttentionPlan plan_attention(const Batch& batch, int group, int kv_heads, int window, int enough,
                             int max_partials) {
  AttentionPlan plan;
  for (const BatchSequence& s : batch.sequences) {
    const int num_rows = s.num_tokens * group;
    for (int first = 0; first < num_rows; first += kTileRows) {
      const int rows = std::min(kTileRows, num_rows - first);
      const int oldest_query = s.num_computed + first / group,
                newest = s.num_computed + (first + rows - 1) / group;
      const int oldest_key = window > 0 ? std::max(0, oldest_query - window + 1) : 0;
      plan.tiles.push_back({s.first_token, s.num_computed, first, rows, s.first_block,
                            oldest_key / kPartition, divide_up(newest + 1, kPartition), -1});
    }
  }
  const bool split = static_cast<int>(plan.tiles.size()) * kv_heads < enough;
  for (int32_t t = 0; t < static_cast<int32_t>(plan.tiles.size()); ++t) {
    AttentionTile& tile = plan.tiles[static_cast<size_t>(t)];
    const int partitions = tile.end_partition - tile.first_partition;
    if (!split || partitions == 1 || plan.num_partials + partitions > max_partials) {
      plan.pieces.push_back({t, tile.first_partition, tile.end_partition});
      continue;
    }
    plan.split_tiles.push_back(t);
    tile.partial = plan.num_partials;
    plan.num_partials += partitions;
    for (int p = tile.first_partition; p < tile.end_partition; ++p) plan.pieces.push_back({t, p, p + 1});
  }
  return plan;
}

}  // namespace engine::cuda
