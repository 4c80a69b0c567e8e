#include "cuda/attention.h"

#include <string>

#include "base/check.h"
#include "cuda/attention_kernels.cuh"

namespace engine::cuda {
namespace {

// visit.operator()<dim>() with the smallest dim that holds a head.
template <class Visit>
void visit_dim(int head_dim, Visit visit) {
  if (head_dim <= 32) return visit.template operator()<32>();
  if (head_dim <= 64) return visit.template operator()<64>();
  if (head_dim <= 128) return visit.template operator()<128>();
  check(head_dim <= kMaxHeadDim, "heads of at most 256 numbers");
  visit.template operator()<kMaxHeadDim>();
}

size_t number_bytes(Format format) {
  size_t bytes = 0;
  visit_kv_format(format, [&]<class Kv>(Kv) { bytes = sizeof(typename Kv::Stored); });
  return bytes;
}

template <class Kv>
Cache<Kv> cache_of(const CudaKvCache& cache, const DeviceBatch& batch, const ModelConfig& config, int layer) {
  using Stored = typename Kv::Stored;
  return {View<const Stored>(cache.memory.as<Stored>(), cache.memory.bytes() / sizeof(Stored)),
          View<const int32_t>(batch.block_tables, static_cast<size_t>(batch.num_block_entries)),
          cache.block_numbers, static_cast<int64_t>(layer) * config.num_key_value_heads * cache.head_numbers,
          cache.head_numbers};
}

}  // namespace

size_t CudaKvCache::head_bytes(const ModelConfig& config, Format format) {
  require(config.head_dim <= kMaxHeadDim, "on a GPU heads have at most " + std::to_string(kMaxHeadDim) +
                                              " numbers, not " + std::to_string(config.head_dim));
  const size_t scales = format == Format::INT8 ? 2 * kBlockSize * sizeof(float) : 0;
  return static_cast<size_t>(2 * squares(config.head_dim) * kSquareNumbers) * number_bytes(format) + scales;
}

CudaKvCache::CudaKvCache(Arena& arena, const ModelConfig& config, Format cache_format, int32_t blocks)
    : head_numbers(static_cast<int64_t>(head_bytes(config, cache_format) / number_bytes(cache_format))),
      block_numbers(head_numbers * config.num_key_value_heads * config.num_hidden_layers),
      memory(arena) {
  require(blocks > 0, "a key/value cache needs at least one block, not " + std::to_string(blocks));
  const size_t heads =
      static_cast<size_t>(config.num_key_value_heads) * static_cast<size_t>(config.num_hidden_layers);
  format = cache_format;
  num_blocks = blocks;
  memory = DeviceMemory(arena, head_bytes(config, cache_format) * heads * static_cast<size_t>(blocks));
}

size_t partial_numbers(int head_dim) {
  return static_cast<size_t>(kTileRows * (head_dim + 2));
}

void attend(cudaStream_t stream, const ModelConfig& config, int layer, const DeviceBatch& batch,
            const DevicePlan& plan, const float* slopes, const float* qkv, const CudaKvCache& cache,
            float* out) {
  const bool rotated = cache.format == Format::INT8;
  const Heads heads{config.num_attention_heads,
                    config.num_key_value_heads,
                    config.head_dim,
                    config.num_attention_heads / config.num_key_value_heads,
                    config.sliding_window.empty() ? 0 : config.sliding_window[static_cast<size_t>(layer)],
                    rotated ? config.attention_scale / static_cast<float>(rotated_together(config.head_dim))
                            : config.attention_scale};
  const size_t tokens = static_cast<size_t>(batch.num_tokens);
  const View<const AttentionTile> tiles(plan.tiles, static_cast<size_t>(plan.num_tiles));
  const View<float> partials(plan.partials, plan.partial_numbers);
  const View<float> result(out, tokens * static_cast<size_t>(config.q_size()));
  const auto kv_heads = static_cast<unsigned>(heads.kv_heads);
  visit_kv_format(cache.format, [&]<class Kv>(Kv) {
    visit_dim(config.head_dim, [&]<int kDim>() {
      launch(stream, dim3(static_cast<unsigned>(plan.num_pieces), kv_heads), kThreads,
             attention_kernel<Kv, kDim>, heads, tiles,
             View<const AttentionPiece>(plan.pieces, static_cast<size_t>(plan.num_pieces)),
             View<const float>(qkv, tokens * static_cast<size_t>(config.qkv_size())),
             cache_of<Kv>(cache, batch, config, layer),
             View<const float>(slopes, static_cast<size_t>(heads.q_heads)), partials, result);
    });
  });
  launch(stream, dim3(static_cast<unsigned>(plan.num_split), kv_heads, kTileRows), kThreads, combine_kernel,
         heads, tiles, View<const int32_t>(plan.split_tiles, static_cast<size_t>(plan.num_split)),
         View<const float>(partials), result);
}

}  // namespace engine::cuda
