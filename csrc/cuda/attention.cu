#include "cuda/attention.h"

#include <string>

#include "base/check.h"
#include "cuda/common.cuh"
#include "cuda/kv_formats.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
constexpr float kLowest = -INFINITY;

// The state of a row: its greatest score, the sum of its weights e^(score - greatest), and the weighted sum
// of values. No key seen: the sum is 0.
struct Weighing {
  float greatest, sum;
};

// Factors of two states when they become one. One of an empty state is never used: what it holds may be no
// number.
struct Merge {
  float into, from, greatest, sum;
};

__device__ Merge merge(Weighing a, Weighing b) {
  if (a.sum == 0) return {0, 1, b.greatest, b.sum};
  if (b.sum == 0) return {1, 0, a.greatest, a.sum};
  const float greatest = fmaxf(a.greatest, b.greatest);
  const float into = exp_f32(a.greatest - greatest), from = exp_f32(b.greatest - greatest);
  return {into, from, greatest, fmaf(b.sum, from, a.sum * into)};
}

__device__ float merged(const Merge& m, float into, float from) {
  if (m.into == 0 && m.from == 1) return from;
  if (m.from == 0 && m.into == 1) return into;
  return fmaf(from, m.from, into * m.into);
}

struct Heads {
  int q_heads, kv_heads, head_dim, group;
  int window;  // keys seen, the token itself included; 0: all
  float scale;

  __device__ int qkv_size() const { return (q_heads + 2 * kv_heads) * head_dim; }
};

template <class Kv>
struct Cache {
  View<const typename Kv::Stored> memory;
  View<const int32_t> tables;
  int64_t block_numbers, head_start;  // head_start: of this layer's first head in a block
  int64_t head_numbers;

  // Of a block of the sequence: its keys; values are kBlockSize * head_dim numbers further.
  __device__ size_t keys(const AttentionTile& tile, int block, int kv_head) const {
    return static_cast<size_t>(tables[static_cast<size_t>(tile.first_block + block)] * block_numbers +
                               head_start + kv_head * head_numbers);
  }
};

// How the kThreads threads share (kTileRows, head_dim) numbers: kCols columns at a time, the rest over rows.
template <int kDim>
struct Share {
  static constexpr int kCols = kDim < kThreads ? kDim : kThreads;
  static constexpr int kColsEach = kDim / kCols;
  static constexpr int kRowGroups = kThreads / kCols;
  static constexpr int kRowsEach = kTileRows / kRowGroups;
  static constexpr int kPitch = kDim + 1;  // of rows in shared memory, so that a column lies in all banks
  __device__ static int col(int c) { return static_cast<int>(threadIdx.x) % kCols + c * kCols; }
  __device__ static int row(int r) { return static_cast<int>(threadIdx.x) / kCols + r * kRowGroups; }
};

template <int kDim>
struct Room {  // shared memory of a block
  Shared<float, kTileRows * Share<kDim>::kPitch> q;
  Shared<float, kBlockSize * Share<kDim>::kPitch> k;
  Shared<float, kTileRows * kPartition> weights;
  Shared<float, kTileRows> greatest, sum;              // of the last partition
  Shared<float, kTileRows> total_greatest, total_sum;  // of all so far
  Shared<float, kTileRows> into, from;
};

__device__ inline int position_of(const AttentionTile& tile, const Heads& heads, int row) {
  return tile.first_position + (tile.first_row + row) / heads.group;
}

__device__ inline bool sees(const Heads& heads, int position, int key) {
  return key <= position && (heads.window == 0 || key > position - heads.window);
}

template <class Kv, int kDim>
__device__ void load_queries(const AttentionTile& tile, const Heads& heads, View<const float> qkv,
                             int kv_head, Room<kDim>& room) {
  for (int i = static_cast<int>(threadIdx.x); i < tile.rows * heads.head_dim; i += kThreads) {
    const int row = i / heads.head_dim, d = i % heads.head_dim, of_sequence = tile.first_row + row;
    const int token = tile.first_token + of_sequence / heads.group;
    const int head = kv_head * heads.group + of_sequence % heads.group;
    room.q[row * Share<kDim>::kPitch + d] =
        qkv[static_cast<size_t>(token) * static_cast<size_t>(heads.qkv_size()) +
            static_cast<size_t>(head * heads.head_dim + d)];
  }
  if constexpr (Kv::kScaled)
    rotate_heads(room.q, 0, tile.rows, Share<kDim>::kPitch, heads.head_dim, static_cast<int>(threadIdx.x),
                 kThreads, [] { __syncthreads(); });
}

// Scores of the partition's keys up to `end`, a block of the cache at a time.
template <class Kv, int kDim>
__device__ void score(const AttentionTile& tile, const Heads& heads, const Cache<Kv>& cache,
                      View<const float> slopes, int kv_head, int begin, int end, Room<kDim>& room) {
  constexpr int pitch = Share<kDim>::kPitch;
  const int thread = static_cast<int>(threadIdx.x), dim = heads.head_dim;
  for (int block = begin / kBlockSize; block * kBlockSize < end; ++block) {
    const size_t keys = cache.keys(tile, block, kv_head);
    __syncthreads();  // the last block's keys have been read
    for (int i = thread; i < kBlockSize * dim; i += kThreads)
      room.k[i / dim * pitch + i % dim] = Kv::load(cache.memory[keys + static_cast<size_t>(i)]);
    __syncthreads();
    for (int i = thread; i < tile.rows * kBlockSize; i += kThreads) {
      const int row = i / kBlockSize, key = i % kBlockSize, position = position_of(tile, heads, row);
      float dot = 0;
      for (int d = 0; d < dim; ++d) dot = fmaf(room.q[row * pitch + d], room.k[key * pitch + d], dot);
      dot *= Kv::kScaled ? heads.scale * kv_scale(cache.memory, keys, dim, key) : heads.scale;
      const int key_position = block * kBlockSize + key;
      if (slopes) {
        const int head = kv_head * heads.group + (tile.first_row + row) % heads.group;
        dot = fmaf(slopes[static_cast<size_t>(head)], static_cast<float>(key_position - position), dot);
      }
      room.weights[row * kPartition + key_position - begin] =
          sees(heads, position, key_position) ? dot : kLowest;
    }
  }
}

// Scores become weights. A warp for each row, four keys for each lane.
template <int kDim>
__device__ void weigh(const AttentionTile& tile, const Heads& heads, int begin, int end, Room<kDim>& room) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int row = warp; row < tile.rows; row += kWarps) {
    const int position = position_of(tile, heads, row);
    float scores[kPartition / kWarpSize], greatest = kLowest, sum = 0;
    for (int i = 0; i < kPartition / kWarpSize; ++i) {
      const int key = lane + i * kWarpSize;
      const bool seen = begin + key < end && sees(heads, position, begin + key);
      scores[i] = seen ? static_cast<float>(room.weights[row * kPartition + key]) : kLowest;
      greatest = fmaxf(greatest, scores[i]);
    }
    greatest = warp_max(greatest);
    for (int i = 0; i < kPartition / kWarpSize; ++i) {
      const int key = lane + i * kWarpSize;
      const bool seen = begin + key < end && sees(heads, position, begin + key);
      const float weight = seen ? exp_f32(scores[i] - greatest) : 0;
      room.weights[row * kPartition + key] = weight;
      sum += weight;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      room.greatest[row] = greatest;
      room.sum[row] = sum;
    }
  }
}

// acc = Σ weight · value over the keys that a row sees, in ascending order. A value that it does not see is
// not multiplied by zero: it may be no number.
template <class Kv, int kDim>
__device__ void add_values(const AttentionTile& tile, const Heads& heads, const Cache<Kv>& cache, int kv_head,
                           int begin, int end, Room<kDim>& room,
                           float (&acc)[Share<kDim>::kRowsEach][Share<kDim>::kColsEach]) {
  using S = Share<kDim>;
  for (int r = 0; r < S::kRowsEach; ++r)
    for (int c = 0; c < S::kColsEach; ++c) acc[r][c] = 0;
  for (int key = begin; key < end; ++key) {
    const int slot = key % kBlockSize;
    const size_t keys = cache.keys(tile, key / kBlockSize, kv_head);
    const size_t values = keys + static_cast<size_t>((kBlockSize + slot) * heads.head_dim);
    const float scale = Kv::kScaled ? kv_scale(cache.memory, keys, heads.head_dim, kBlockSize + slot) : 1.0f;
    float value[S::kColsEach];
    for (int c = 0; c < S::kColsEach; ++c)
      value[c] =
          S::col(c) < heads.head_dim ? Kv::load(cache.memory[values + static_cast<size_t>(S::col(c))]) : 0;
    for (int r = 0; r < S::kRowsEach; ++r) {
      const int row = S::row(r);
      if (row >= tile.rows || !sees(heads, position_of(tile, heads, row), key)) continue;
      const float weight = room.weights[row * kPartition + key - begin] * scale;
      for (int c = 0; c < S::kColsEach; ++c) acc[r][c] = fmaf(weight, value[c], acc[r][c]);
    }
  }
}

// Where a row's result goes.
__device__ inline size_t out_row(const AttentionTile& tile, const Heads& heads, int kv_head, int row) {
  const int of_sequence = tile.first_row + row;
  const int token = tile.first_token + of_sequence / heads.group;
  const int head = kv_head * heads.group + of_sequence % heads.group;
  return (static_cast<size_t>(token) * static_cast<size_t>(heads.q_heads) + static_cast<size_t>(head)) *
         static_cast<size_t>(heads.head_dim);
}

// A partition's state in memory: rows' greatest scores, rows' sums, then (kTileRows, head_dim).
__device__ inline size_t partial_start(int partial, int kv_head, const Heads& heads) {
  return (static_cast<size_t>(partial) * static_cast<size_t>(heads.kv_heads) + static_cast<size_t>(kv_head)) *
         static_cast<size_t>(kTileRows * (heads.head_dim + 2));
}

template <int kDim>
using Sums = float[Share<kDim>::kRowsEach][Share<kDim>::kColsEach];

template <int kDim>
__device__ void write_partial(View<float> partials, const AttentionTile& tile, const Heads& heads,
                              size_t start, Room<kDim>& room, const Sums<kDim>& acc) {
  using S = Share<kDim>;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < tile.rows) {
    partials[start + static_cast<size_t>(thread)] = room.greatest[thread];
    partials[start + static_cast<size_t>(kTileRows + thread)] = room.sum[thread];
  }
  for (int r = 0; r < S::kRowsEach; ++r)
    for (int c = 0; c < S::kColsEach; ++c)
      if (S::row(r) < tile.rows && S::col(c) < heads.head_dim)
        partials[start + static_cast<size_t>(2 * kTileRows + S::row(r) * heads.head_dim + S::col(c))] =
            acc[r][c];
}

// total = total combined with the partition whose weighing stands in room.greatest and room.sum.
template <int kDim>
__device__ void merge_into(const AttentionTile& tile, Room<kDim>& room, Sums<kDim>& total,
                           const Sums<kDim>& acc) {
  using S = Share<kDim>;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < tile.rows) {
    const Merge m = merge({room.total_greatest[thread], room.total_sum[thread]},
                          {room.greatest[thread], room.sum[thread]});
    room.into[thread] = m.into;
    room.from[thread] = m.from;
    room.total_greatest[thread] = m.greatest;
    room.total_sum[thread] = m.sum;
  }
  __syncthreads();
  for (int r = 0; r < S::kRowsEach; ++r) {
    if (S::row(r) >= tile.rows) continue;
    const Merge m{room.into[S::row(r)], room.from[S::row(r)], 0, 0};
    for (int c = 0; c < S::kColsEach; ++c) total[r][c] = merged(m, total[r][c], acc[r][c]);
  }
}

template <int kDim>
__device__ void write_result(View<float> out, const AttentionTile& tile, const Heads& heads, int kv_head,
                             Room<kDim>& room, const Sums<kDim>& total) {
  using S = Share<kDim>;
  for (int r = 0; r < S::kRowsEach; ++r) {
    const int row = S::row(r);
    if (row >= tile.rows) continue;
    const float sum = room.total_sum[row];
    for (int c = 0; c < S::kColsEach; ++c)
      if (S::col(c) < heads.head_dim)
        out[out_row(tile, heads, kv_head, row) + static_cast<size_t>(S::col(c))] = total[r][c] / sum;
  }
}

template <int kDim>
__device__ void start_rows(Room<kDim>& room) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kTileRows) {
    room.total_greatest[thread] = kLowest;
    room.total_sum[thread] = 0;
  }
}

// A block for each (piece, key/value head).
template <class Kv, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(Heads heads, View<const AttentionTile> tiles, View<const AttentionPiece> pieces,
                     View<const float> qkv, Cache<Kv> cache, View<const float> slopes, View<float> partials,
                     View<float> out) {
  __shared__ Room<kDim> room;
  const AttentionPiece piece = pieces[blockIdx.x];
  if (piece.tile < 0) return;
  const AttentionTile tile = tiles[static_cast<size_t>(piece.tile)];
  const int kv_head = static_cast<int>(blockIdx.y);
  const int keys = position_of(tile, heads, tile.rows - 1) + 1;  // that the last row sees
  load_queries<Kv, kDim>(tile, heads, qkv, kv_head, room);
  start_rows<kDim>(room);
  Sums<kDim> total = {};
  for (int p = piece.first_partition; p < piece.end_partition; ++p) {
    const int begin = p * kPartition, end = min(begin + kPartition, keys);
    Sums<kDim> acc;
    score<Kv, kDim>(tile, heads, cache, slopes, kv_head, begin, end, room);
    __syncthreads();
    weigh<kDim>(tile, heads, begin, end, room);
    __syncthreads();
    add_values<Kv, kDim>(tile, heads, cache, kv_head, begin, end, room, acc);
    if (tile.partial >= 0)
      write_partial<kDim>(partials, tile, heads,
                          partial_start(tile.partial + p - tile.first_partition, kv_head, heads), room, acc);
    else
      merge_into<kDim>(tile, room, total, acc);
  }
  if (tile.partial < 0) write_result<kDim>(out, tile, heads, kv_head, room, total);
}

// Combines the partitions of a tile that were computed apart. A block for each (tile, key/value head).
template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(Heads heads, View<const AttentionTile> tiles, View<const int32_t> split_tiles,
                   View<const float> partials, View<float> out) {
  using S = Share<kDim>;
  __shared__ Room<kDim> room;
  if (split_tiles[blockIdx.x] < 0) return;
  const AttentionTile tile = tiles[static_cast<size_t>(split_tiles[blockIdx.x])];
  const int kv_head = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  start_rows<kDim>(room);
  Sums<kDim> total = {};
  for (int p = 0; p < tile.end_partition - tile.first_partition; ++p) {
    const size_t start = partial_start(tile.partial + p, kv_head, heads);
    __syncthreads();
    if (thread < tile.rows) {
      room.greatest[thread] = partials[start + static_cast<size_t>(thread)];
      room.sum[thread] = partials[start + static_cast<size_t>(kTileRows + thread)];
    }
    Sums<kDim> acc = {};
    for (int r = 0; r < S::kRowsEach; ++r)
      for (int c = 0; c < S::kColsEach; ++c)
        if (S::row(r) < tile.rows && S::col(c) < heads.head_dim)
          acc[r][c] =
              partials[start + static_cast<size_t>(2 * kTileRows + S::row(r) * heads.head_dim + S::col(c))];
    merge_into<kDim>(tile, room, total, acc);
  }
  write_result<kDim>(out, tile, heads, kv_head, room, total);
}

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
  return static_cast<size_t>(2 * kBlockSize * config.head_dim) * number_bytes(format) + scales;
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
  visit_dim(config.head_dim, [&]<int kDim>() {
    launch(stream, dim3(static_cast<unsigned>(plan.num_split), kv_heads), kThreads, combine_kernel<kDim>,
           heads, tiles, View<const int32_t>(plan.split_tiles, static_cast<size_t>(plan.num_split)),
           View<const float>(partials), result);
  });
}

}  // namespace engine::cuda
