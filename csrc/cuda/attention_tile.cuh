// What a block of attention.cu's threads works on: queries of one key/value head, as the left operands of
// matrix instructions, and the keys and values of their sequence.
#pragma once

#include "cuda/kv_formats.cuh"

namespace engine::cuda {

inline constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
inline constexpr int kTerms = 3;     // bf16 numbers that an f32 is the sum of
inline constexpr int kFragment = 4;  // words of a lane
inline constexpr int kTile = 8;      // columns of a matrix instruction's result
inline constexpr int kWarpBlocks = kPartition / kBlockSize / kWarps;  // of keys that a warp scores
inline constexpr float kLowest = -INFINITY;

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

__device__ inline Merge merge(Weighing a, Weighing b) {
  if (a.sum == 0) return {0, 1, b.greatest, b.sum};
  if (b.sum == 0) return {1, 0, a.greatest, a.sum};
  const float greatest = fmaxf(a.greatest, b.greatest);
  const float into = exp_f32(a.greatest - greatest), from = exp_f32(b.greatest - greatest);
  return {into, from, greatest, fmaf(b.sum, from, a.sum * into)};
}

__device__ inline float merged(const Merge& m, float into, float from) {
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

// Keys of a partition that rows of a tile see.
struct Span {
  int start;                   // of the partition
  int end;                     // of what the last row sees
  int first_block, end_block;  // that hold a key which some row sees

  __device__ bool has(int block) const { return block >= first_block && block < end_block; }
};

// A tile's rows: queries of heads that share a key/value head.
struct Queries {
  AttentionTile tile;
  Heads heads;
  int kv_head;

  __device__ int position(int row) const {
    return tile.first_position + (tile.first_row + row) / heads.group;
  }
  __device__ int head(int row) const { return kv_head * heads.group + (tile.first_row + row) % heads.group; }
  __device__ bool sees(int row, int key) const {
    return key <= position(row) && (heads.window == 0 || key > position(row) - heads.window);
  }
  // Where a row's numbers start in an array with `of_token` numbers for each token.
  __device__ size_t start(int row, int of_token) const {
    const int token = tile.first_token + (tile.first_row + row) / heads.group;
    return static_cast<size_t>(token) * static_cast<size_t>(of_token) +
           static_cast<size_t>(head(row) * heads.head_dim);
  }
  __device__ Span span(int partition) const {
    const int first = partition * kPartition, end = min(first + kPartition, position(tile.rows - 1) + 1);
    const int oldest = heads.window == 0 ? 0 : position(0) - heads.window + 1;
    return {first, end, max(first, oldest) / kBlockSize, (end + kBlockSize - 1) / kBlockSize};
  }
  // A partition's state in memory: rows' greatest scores, rows' sums, then (kTileRows, head_dim).
  __device__ size_t partial_start(int partition) const {
    const int partial = tile.partial + partition - tile.first_partition;
    return (static_cast<size_t>(partial) * static_cast<size_t>(heads.kv_heads) +
            static_cast<size_t>(kv_head)) *
           static_cast<size_t>(kTileRows * (heads.head_dim + 2));
  }
};

template <class Kv>
struct Cache {
  View<const typename Kv::Stored> memory;
  View<const int32_t> tables;
  int64_t block_numbers, head_start;  // head_start: of this layer's first head in a block
  int64_t head_numbers;

  // Where the head's part of a block of the sequence starts.
  __device__ size_t part(const Queries& queries, int block) const {
    return static_cast<size_t>(tables[static_cast<size_t>(queries.tile.first_block + block)] * block_numbers +
                               head_start + queries.kv_head * head_numbers);
  }
  // A lane's numbers of a square; the values' squares follow the keys'.
  __device__ void load(size_t part, int square, int lane, SquareTerms<Kv::kTerms>& terms) const {
    Kv::load(memory, part + static_cast<size_t>(square * kSquareNumbers + lane * kLaneNumbers), terms);
  }
  __device__ float scale(size_t part, int head_dim, bool value, int slot) const {
    return memory.template load<float>(part + static_cast<size_t>(scale_byte(head_dim, value, slot)));
  }
};

// Shared memory of a block. Left operands lie as fragments: (kTerms, kDim or kPartition / 16, 32, 4).
template <int kDim>
struct Room {
  Shared<uint32_t, kTerms * kDim / kSquare * kWarpSize * kFragment> q;
  Shared<uint32_t, kTerms * kPartition / kBlockSize * kWarpSize * kFragment> weights;
  Shared<float, kWarps * kTileRows> greatest, sum;  // of the keys of each warp
};

// Which thread this is. With g = lane / 4 and t = lane % 4 it has of a result rows g and g + 8, columns 2t
// and 2t + 1 of each tile of 8: number i is in row(i / 2) and column(i).
struct Me {
  int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  __device__ int row(int upper) const { return lane / 4 + 8 * upper; }
  __device__ int column(int i) const { return lane % 4 * 2 + i % 2; }
};

// What a warp sums up of a tile's result: in the squares warp, warp + kWarps, …, of (kTileRows, 16).
template <int kDim>
using Sums = float[(kDim / kSquare + kWarps - 1) / kWarps][2][4];

template <int kNumbers>
__device__ void load_fragments(Shared<uint32_t, kNumbers>& from, int step, int lane,
                               uint32_t (&a)[kTerms][kFragment]) {
  constexpr int steps = kNumbers / (kTerms * kWarpSize * kFragment);
  for (int term = 0; term < kTerms; ++term) {
    const auto words = from.template load<uint4>(((term * steps + step) * kWarpSize + lane) * kFragment);
    a[term][0] = words.x, a[term][1] = words.y, a[term][2] = words.z, a[term][3] = words.w;
  }
}

// Queries as fragments. A warp for each row; rows that the tile has not are zeros.
template <class Kv, int kDim>
__device__ void load_queries(const Queries& queries, View<const float> qkv, Room<kDim>& room) {
  const Me me;
  const Heads& heads = queries.heads;
  for (int row = me.warp; row < kTileRows; row += kWarps) {
    LanePairs<kDim> x = {};
    if (row < queries.tile.rows)
      load_head(qkv.from(queries.start(row, heads.qkv_size())), heads.head_dim, me.lane, x);
    if constexpr (Kv::kScaled) rotate_head(x, heads.head_dim, me.lane);
    for (int j = 0; j < (kDim + 63) / 64; ++j) {
      const int d = 2 * me.lane + 64 * j;
      if (d >= squares(heads.head_dim) * kSquare) continue;
      const int lane = row % 8 * 4 + d % 8 / 2, word = d % kSquare / 8 * 2 + row / 8;
      for (int term = 0; term < kTerms; ++term) {
        const int step = term * (kDim / kSquare) + d / kSquare;
        room.q[(step * kWarpSize + lane) * kFragment + word] = split_pair(x[j][0], x[j][1]);
      }
    }
  }
}

}  // namespace engine::cuda
