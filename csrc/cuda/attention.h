// The paged key/value cache, what fills it, and attention over it.
//
// As on the CPU, keys are taken in partitions of kPartition that start at position 0, each partition has its
// own softmax, and the partitions' results are combined in ascending order: how queries are tiled and who
// computes which partition changes no bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "cuda/runtime.h"
#include "device/device.h"

namespace engine::cuda {

inline constexpr int kPartition = 128;  // keys; a multiple of kBlockSize
inline constexpr int kTileRows = 16;  // queries of one key/value head that share the loads of keys and values
inline constexpr int kMaxHeadDim = 256;

// In memory: (block, layer, key/value head) → squares of keys, squares of values (kv_formats.cuh), then if
// they are bytes f32 scales of keys and of values (2, kBlockSize).
class CudaKvCache : public KvCache {
 public:
  CudaKvCache(Arena& arena, const ModelConfig& config, Format format, int32_t num_blocks);

  static size_t head_bytes(const ModelConfig& config,
                           Format format);  // of one head's keys and values in a block
  int64_t head_numbers;                     // of one head in a block
  int64_t block_numbers;                    // of all layers and heads in a block
  DeviceMemory memory;
};

// A batch in device memory: uploaded once, read in every layer.
struct DeviceBatch {
  int num_tokens = 0;
  const int32_t* positions = nullptr;     // (num_tokens)
  const int64_t* slots = nullptr;         // (num_tokens): block * kBlockSize + slot in the block; -1: none
  const int32_t* block_tables = nullptr;  // (num_block_entries)
  int num_block_entries = 0;
  const float* cos_sin = nullptr;  // (num_tokens, rotary_dim / 2, 2)
};

// Queries of one sequence, of the heads that share a key/value head: row i is token i / group, head i %
// group.
struct AttentionTile {
  int32_t first_token;      // of the sequence, in the batch
  int32_t first_position;   // of that token
  int32_t first_row, rows;  // at most kTileRows
  int32_t first_block;      // of the sequence's block table
  int32_t first_partition, end_partition;
  int32_t partial;  // index of its first partition's state when partitions are computed apart, else -1
};

// One block's work: a whole tile, or one partition of it. Tile -1: none.
struct AttentionPiece {
  int32_t tile, first_partition, end_partition;
};

struct AttentionPlan {
  std::vector<AttentionTile> tiles;
  std::vector<AttentionPiece> pieces;
  std::vector<int32_t> split_tiles;  // -1: none
  int num_partials = 0;              // states of (kTileRows, head_dim + 2) numbers for each key/value head
};

// Splits tiles as long as there are fewer than `enough` blocks, and room for the states of max_partials.
AttentionPlan plan_attention(const Batch& batch, int group, int kv_heads, int window, int enough,
                             int max_partials);

// The plan in device memory, and room for the partitions' states.
struct DevicePlan {
  int num_tiles = 0, num_pieces = 0, num_split = 0, num_partials = 0;
  const AttentionTile* tiles = nullptr;
  const AttentionPiece* pieces = nullptr;
  const int32_t* split_tiles = nullptr;
  float* partials = nullptr;
  size_t partial_numbers = 0;
};

// cos and sin of the batch's positions; inv_freq (half) in device memory.
void compute_rotation(cudaStream_t stream, const DeviceBatch& batch, const float* inv_freq, int half,
                      float factor, float* cos_sin);
void rope_store(cudaStream_t stream, const ModelConfig& config, int layer, const DeviceBatch& batch,
                float* qkv, const CudaKvCache& cache);
size_t partial_numbers(int head_dim);
void attend(cudaStream_t stream, const ModelConfig& config, int layer, const DeviceBatch& batch,
            const DevicePlan& plan, const float* slopes, const float* qkv, const CudaKvCache& cache,
            float* out);

}  // namespace engine::cuda
