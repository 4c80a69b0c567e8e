#include "cpu/attention.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "base/check.h"
#include "cpu/pointwise.h"

namespace engine {
namespace {

constexpr int kTileRows = 24;       // query rows that share the loads of keys and values
constexpr int kTasksPerThread = 4;  // enough for the slowest thread to take less
constexpr int kTokensPerTask = 16;  // of rope_store_kv

int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

}  // namespace

size_t CpuKvCache::head_bytes(const ModelConfig& config, Format format) {
  if (format == Format::INT8) {
    require(config.head_dim % 4 == 0 && config.head_dim <= 512,
            "a key/value cache of bytes needs heads of a multiple of 4 and at most 512 numbers, not " +
                std::to_string(config.head_dim));
    const int per_token = config.head_dim + padded(config.head_dim) + 2 * static_cast<int>(sizeof(float));
    return static_cast<size_t>(kBlockSize * per_token);
  }
  check(is_plain(format), "a key/value cache is F32, F16, BF16 or INT8");
  return row_bytes(format, kBlockSize) * static_cast<size_t>(config.head_dim + padded(config.head_dim));
}

CpuKvCache::CpuKvCache(const ModelConfig& config, Format cache_format, int32_t blocks)
    : num_heads_(config.num_key_value_heads),
      head_bytes_(head_bytes(config, cache_format)),
      block_stride_(head_bytes_ * static_cast<size_t>(num_heads_ * config.num_hidden_layers)) {
  require(blocks > 0, "a key/value cache needs at least one block, not " + std::to_string(blocks));
  format = cache_format;
  num_blocks = blocks;
  bytes_ = block_stride_ * static_cast<size_t>(blocks);
  void* memory =
      mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(memory != MAP_FAILED,
          "out of memory: the key/value cache takes " + std::to_string(bytes_ >> 20) + " MiB");
  madvise(memory, bytes_, MADV_HUGEPAGE);  // fewer faults and less address translation; advice: it may fail
  memory_ = static_cast<std::byte*>(memory);
}

CpuKvCache::~CpuKvCache() {
  munmap(memory_, bytes_);
}

// Angles in f32 (position * inv_freq) and then cos and sin, as transformers computes them.
void Attention::prepare_rotation(const ModelConfig& config, const std::vector<int32_t>& positions) {
  if (positions == positions_ && config.rope_inv_freq == inv_freq_ &&
      config.rope_attention_factor == attention_factor_)
    return;
  positions_ = positions;
  inv_freq_ = config.rope_inv_freq;
  attention_factor_ = config.rope_attention_factor;
  const size_t half = inv_freq_.size();
  cos_.resize(positions.size() * half);
  sin_.resize(positions.size() * half);
  const int n = static_cast<int>(positions.size());
  pool_.run(divide_up(n, kTokensPerTask), [&](int task, int) {
    const size_t end = static_cast<size_t>(std::min(n, (task + 1) * kTokensPerTask));
    for (size_t t = static_cast<size_t>(task * kTokensPerTask); t < end; ++t) {
      for (size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(positions_[t]) * inv_freq_[i];
        cos_[t * half + i] = std::cos(angle) * attention_factor_;
        sin_[t * half + i] = std::sin(angle) * attention_factor_;
      }
    }
  });
}

void Attention::rope_store_kv(const ModelConfig& config, int layer, const Batch& batch, float* qkv,
                              CpuKvCache& cache) {
  check(layer >= 0 && layer < config.num_hidden_layers, "rope_store_kv: layer exists");
  check(check_tables(batch) < cache.num_blocks, "batch: block tables name blocks of the cache");
  prepare_rotation(config, batch.positions);
  slots_.clear();
  for (const BatchSequence& s : batch.sequences)
    for (int32_t i = s.num_computed; i < s.num_computed + s.num_tokens; ++i)
      slots_.push_back(static_cast<int64_t>(batch.block_tables[s.first_block + i / kBlockSize]) * kBlockSize +
                       i % kBlockSize);
  const int n = batch.num_tokens();
  pool_.run(divide_up(n, kTokensPerTask), [&](int task, int) {
    const int end = std::min(n, (task + 1) * kTokensPerTask);
    for (int t = task * kTokensPerTask; t < end; ++t)
      rope_store_token(config, layer, t, qkv + static_cast<int64_t>(t) * config.qkv_size(), cache);
  });
}

void Attention::rope_store_token(const ModelConfig& config, int layer, int token, float* qkv,
                                 CpuKvCache& cache) const {
  const AttentionKernels& kernels = *kernels_.attention;
  const int head_dim = config.head_dim, half = static_cast<int>(inv_freq_.size());
  if (config.clip_qkv > 0)
    kernels_.pointwise->clamp(qkv, config.clip_qkv, static_cast<size_t>(config.qkv_size()));
  if (half > 0) {
    const size_t angles = static_cast<size_t>(token) * inv_freq_.size();
    kernels.rotate(qkv, config.num_attention_heads + config.num_key_value_heads, head_dim, &cos_[angles],
                   &sin_[angles], half, config.rope_interleaved);
  }
  const auto block = static_cast<int32_t>(slots_[token] / kBlockSize);
  const int slot = static_cast<int>(slots_[token] % kBlockSize);
  const auto store = kernels.store[cache_index(cache.format)];
  const float* keys = qkv + config.q_size();
  const float* values = keys + config.kv_size();
  for (int head = 0; head < config.num_key_value_heads; ++head)
    store(keys + head * head_dim, values + head * head_dim, head_dim, slot, cache.head(layer, block, head));
}

struct Attention::Call {
  const ModelConfig& config;
  int layer;
  const Batch& batch;
  const float* qkv;
  const CpuKvCache& cache;
  float* out;

  int kv_heads() const { return config.num_key_value_heads; }
  int group() const { return config.num_attention_heads / config.num_key_value_heads; }
  int window() const { return config.sliding_window.empty() ? 0 : config.sliding_window[layer]; }
  int row_size() const { return row_state_size(config.head_dim); }
};

void Attention::attend(const ModelConfig& config, int layer, const Batch& batch, const float* qkv,
                       const CpuKvCache& cache, float* out) {
  check(layer >= 0 && layer < config.num_hidden_layers, "attention: layer exists");
  check(check_tables(batch) < cache.num_blocks, "batch: block tables name blocks of the cache");
  const Call call{config, layer, batch, qkv, cache, out};
  plan(call);
  cut(call);
  scratch_.resize(static_cast<size_t>(pool_.size()));
  const int heads = call.kv_heads();
  const int num_tasks = static_cast<int>(pieces_.size()) * heads;
  pool_.run(num_tasks, [&](int task, int worker) {
    const int last_first = num_tasks - 1 - task;  // later tokens see more keys: the long tasks start first
    run_piece(call, pieces_[last_first / heads], last_first % heads, scratch_[worker]);
  });
  pool_.run(static_cast<int>(split_tiles_.size()) * heads,
            [&](int task, int) { combine(call, tiles_[split_tiles_[task / heads]], task % heads); });
}

// The tiles, each a few tokens of a sequence.
void Attention::plan(const Call& call) {
  tiles_.clear();
  const int tokens_per_tile = std::max(1, kTileRows / call.group());
  const auto& sequences = call.batch.sequences;
  for (int s = 0; s < static_cast<int>(sequences.size()); ++s) {
    for (int first = 0; first < sequences[s].num_tokens; first += tokens_per_tile) {
      const int tokens = std::min(tokens_per_tile, sequences[s].num_tokens - first);
      const int position = sequences[s].num_computed + first;
      const int oldest = call.window() > 0 ? std::max(0, position - call.window() + 1) : 0;
      tiles_.push_back(
          {s, first, tokens, oldest / kPartition, divide_up(position + tokens, kPartition), false, 0});
    }
  }
}

// The pieces: whole tiles, unless one is so large that a thread would still work at it when the others are
// done.
void Attention::cut(const Call& call) {
  pieces_.clear();
  split_tiles_.clear();
  const auto cost = [](const Tile& tile) {
    return static_cast<int64_t>(tile.num_tokens) * (tile.end_partition - tile.first_partition);
  };
  int64_t total = 0, rows = 0;
  for (const Tile& tile : tiles_) total += cost(tile) * call.kv_heads();
  const int64_t share =
      pool_.size() == 1 ? total : std::max<int64_t>(1, total / (pool_.size() * kTasksPerThread));
  for (int t = 0; t < static_cast<int>(tiles_.size()); ++t) {
    Tile& tile = tiles_[t];
    const int partitions = tile.end_partition - tile.first_partition;
    const int per_piece = divide_up(
        partitions, static_cast<int>(std::min<int64_t>(partitions, (cost(tile) + share - 1) / share)));
    tile.split = per_piece < partitions;
    if (tile.split) {
      split_tiles_.push_back(t);
      tile.first_row = rows;
      rows += static_cast<int64_t>(partitions) * tile.num_tokens * call.config.num_attention_heads;
    }
    for (int p = tile.first_partition; p < tile.end_partition; p += per_piece)
      pieces_.push_back({t, p, std::min(tile.end_partition, p + per_piece)});
  }
  const auto size = static_cast<size_t>(rows * call.row_size());
  if (partials_.size() < size) partials_.resize(size);
}

AttentionTile Attention::kernel_tile(const Call& call, const Tile& tile, int kv_head) const {
  const ModelConfig& config = call.config;
  const BatchSequence& sequence = call.batch.sequences[tile.sequence];
  const int first_head = kv_head * call.group();
  const int64_t row = sequence.first_token + tile.first_token;
  return {
      .q = call.qkv + row * config.qkv_size() + first_head * config.head_dim,
      .q_stride = config.qkv_size(),
      .num_tokens = tile.num_tokens,
      .group = call.group(),
      .head_dim = config.head_dim,
      .first_position = sequence.num_computed + tile.first_token,
      .window = call.window(),
      .scale = config.attention_scale,
      .slopes = config.alibi_slopes.empty() ? nullptr : &config.alibi_slopes[first_head],
      .cache = call.cache.head(call.layer, 0, kv_head),
      .block_stride = call.cache.block_stride(),
      .block_table = &call.batch.block_tables[sequence.first_block],
  };
}

float* Attention::partial(const Call& call, const Tile& tile, int kv_head, int partition) {
  const int64_t states = static_cast<int64_t>(partition - tile.first_partition) * call.kv_heads() + kv_head;
  const int64_t row = tile.first_row + states * tile.num_tokens * call.group();
  return partials_.data() + row * call.row_size();
}

void Attention::run_piece(const Call& call, const Piece& piece, int kv_head, Scratch& scratch) {
  const AttentionKernels& kernels = *kernels_.attention;
  const Tile& tile = tiles_[piece.tile];
  const AttentionTile kernel = kernel_tile(call, tile, kv_head);
  const int rows = kernel.num_tokens * kernel.group;
  scratch.packed.resize(static_cast<size_t>(divide_up(rows, kPackedRows) * kPackedRows * kernel.head_dim));
  scratch.scores.resize(static_cast<size_t>(rows * kPartition));
  scratch.states.resize(static_cast<size_t>(rows * call.row_size()));
  scratch.later_states.resize(scratch.states.size());

  kernels.pack[cache_index(call.cache.format)](kernel, scratch.packed.data());
  for (int p = piece.first_partition; p < piece.end_partition; ++p) {
    const bool first = p == piece.first_partition;
    float* states =
        tile.split ? partial(call, tile, kv_head, p) : (first ? scratch.states : scratch.later_states).data();
    const auto attend = kernels.partition[cache_index(call.cache.format)];
    attend(kernel, scratch.packed.data(), p, scratch.scores.data(), states);
    if (!tile.split && !first) kernels.combine(scratch.states.data(), states, rows, kernel.head_dim);
  }
  if (!tile.split) finish(call, tile, kv_head, scratch.states.data());
}

void Attention::combine(const Call& call, const Tile& tile, int kv_head) {
  float* states = partial(call, tile, kv_head, tile.first_partition);
  for (int p = tile.first_partition + 1; p < tile.end_partition; ++p)
    kernels_.attention->combine(states, partial(call, tile, kv_head, p), tile.num_tokens * call.group(),
                                call.config.head_dim);
  finish(call, tile, kv_head, states);
}

void Attention::finish(const Call& call, const Tile& tile, int kv_head, const float* states) const {
  const ModelConfig& config = call.config;
  const int64_t first_row = call.batch.sequences[tile.sequence].first_token + tile.first_token;
  for (int t = 0; t < tile.num_tokens; ++t) {
    float* out = call.out + (first_row + t) * config.q_size() + kv_head * call.group() * config.head_dim;
    kernels_.attention->finish(states + t * call.group() * call.row_size(), call.group(), config.head_dim,
                               out);
  }
}

}  // namespace engine
