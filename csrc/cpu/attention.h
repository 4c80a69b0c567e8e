// Attention over the paged key/value cache, and what fills that cache.
//
// The result for a query token depends on its own query and the keys and values that it sees, bit for bit:
// keys are taken in partitions of kPartition that start at position 0, in ascending order, one chain of
// multiply-adds per number; each partition has its own softmax, and the partitions' results are combined in
// ascending order. How queries are tiled, chunked or spread over threads only decides who computes what. Keys
// that a query does not see are never multiplied by zero: a block may hold anything behind its sequence's
// end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "device/device.h"

namespace engine {

inline constexpr int kPartition = 128;  // keys; a multiple of kBlockSize

// Rounded up to whole vectors. Static, as row_state_size() below: the ISA files must not export code of their
// own.
static constexpr int padded(int size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

// In memory: (block, layer, key/value head) → keys (head_dim, kBlockSize), then values (kBlockSize,
// padded(head_dim)). So the blocks in use lie together, whatever the number of layers. Keys lie transposed,
// so that a vector holds one number of sixteen keys and a dot product needs no horizontal sum.
//
// INT8: both as bytes, four columns of a key and four keys of a column to a lane, each followed by their
// scales (attention_int8.inl).
class CpuKvCache : public KvCache {
 public:
  CpuKvCache(const ModelConfig& config, Format format, int32_t num_blocks);
  ~CpuKvCache() override;
  CpuKvCache(const CpuKvCache&) = delete;
  CpuKvCache& operator=(const CpuKvCache&) = delete;

  static size_t head_bytes(const ModelConfig& config,
                           Format format);  // of one head's keys and values in a block
  size_t block_stride() const { return block_stride_; }
  size_t bytes() const { return bytes_; }
  std::byte* head(int layer, int32_t block, int kv_head) const {
    return memory_ + static_cast<size_t>(block) * block_stride_ +
           static_cast<size_t>(layer * num_heads_ + kv_head) * head_bytes_;
  }

 private:
  int num_heads_;
  size_t head_bytes_, block_stride_, bytes_;
  std::byte* memory_;  // mapped; a page takes memory once it is written
};

// Consecutive tokens of one sequence and the query heads that share one key/value head: num_tokens * group
// rows.
struct AttentionTile {
  const float* q;  // (num_tokens, group, head_dim), tokens q_stride apart
  int64_t q_stride;
  int num_tokens, group, head_dim;
  int first_position;
  int window;  // keys seen, the token itself included; 0: all
  float scale;
  const float* slopes;         // (group): ALiBi; or null
  const std::byte* cache;      // this layer and head in block 0
  size_t block_stride;         // bytes
  const int32_t* block_table;  // (first_position + num_tokens) / kBlockSize, rounded up
};

// What one row has gathered: Σ w v (padded(head_dim)), then the maximal score and Σ w. No keys seen: Σ w = 0.
static constexpr int row_state_size(int head_dim) {
  return padded(head_dim) + kLanes;
}

inline constexpr int kPackedRows = 12;  // packed queries are padded to a multiple of it

static constexpr int cache_index(Format format) {
  return format == Format::INT8 ? 3 : static_cast<int>(format);
}

struct AttentionKernels {
  // By format of the cache (cache_index()).
  // Stores one token's key and value of one head, (head_dim) each.
  void (*store[4])(const float* key, const float* value, int head_dim, int slot, std::byte* head);
  // The tile's queries as partition() multiplies them, in the room of (num_rows rounded up to kPackedRows,
  // head_dim) floats.
  void (*pack[4])(const AttentionTile& tile, float* packed);
  // Attends to keys [kPartition * index, kPartition * (index + 1)); states (num_rows, row_state_size), scores
  // (num_rows, kPartition) is scratch.
  void (*partition[4])(const AttentionTile& tile, const float* packed, int index, float* scores,
                       float* states);
  // into = into combined with `from`, whose keys come later.
  void (*combine)(float* into, const float* from, int num_rows, int head_dim);
  // out (num_rows, head_dim) = Σ w v / Σ w for the rows of one token.
  void (*finish)(const float* states, int num_rows, int head_dim, float* out);
  // Rotates the first 2 * half numbers of each head of x (num_heads, head_dim) by the angles of cos, sin
  // (half).
  void (*rotate)(float* x, int num_heads, int head_dim, const float* cos, const float* sin, int half,
                 bool interleaved);
};

class Attention {
 public:
  Attention(const Kernels& kernels, ThreadPool& pool) : kernels_(kernels), pool_(pool) {}

  void rope_store_kv(const ModelConfig& config, int layer, const Batch& batch, float* qkv, CpuKvCache& cache);
  void attend(const ModelConfig& config, int layer, const Batch& batch, const float* qkv,
              const CpuKvCache& cache, float* out);

 private:
  struct Call;  // the arguments of attend()
  // Query tokens of one sequence, all heads; and the partitions that they see.
  struct Tile {
    int sequence, first_token, num_tokens;  // first_token: within the sequence's tokens of this batch
    int first_partition, end_partition;
    bool split;         // its partitions are several tasks' work, and combined afterwards
    int64_t first_row;  // of its states in partials_ if split: (partition, kv_head, num_tokens * group)
  };
  struct Piece {  // of a tile: partitions that one task takes
    int tile, first_partition, end_partition;
  };
  struct Scratch {  // of one worker
    std::vector<float> packed, scores, states, later_states;
  };

  void prepare_rotation(const ModelConfig& config, const std::vector<int32_t>& positions);
  void rope_store_token(const ModelConfig& config, int layer, int token, float* qkv, CpuKvCache& cache) const;
  void plan(const Call& call);
  void cut(const Call& call);
  AttentionTile kernel_tile(const Call& call, const Tile& tile, int kv_head) const;
  float* partial(const Call& call, const Tile& tile, int kv_head, int partition);
  void run_piece(const Call& call, const Piece& piece, int kv_head, Scratch& scratch);
  void combine(const Call& call, const Tile& tile, int kv_head);
  void finish(const Call& call, const Tile& tile, int kv_head, const float* states) const;

  const Kernels& kernels_;
  ThreadPool& pool_;

  // cos and sin of the last batch: computed in its first layer, read in the others.
  std::vector<int32_t> positions_;
  std::vector<float> inv_freq_;
  float attention_factor_ = 0;
  std::vector<float> cos_, sin_;  // (positions_.size(), inv_freq_.size())
  std::vector<int64_t> slots_;    // (num_tokens): block * kBlockSize + slot of each token of the call

  std::vector<Tile> tiles_;
  std::vector<Piece> pieces_;
  std::vector<int> split_tiles_;  // indices into tiles_
  std::vector<float> partials_;   // states of the split tiles, one per partition: (rows, row_state_size)
  std::vector<Scratch> scratch_;  // (pool_.size())
};

}  // namespace engine
