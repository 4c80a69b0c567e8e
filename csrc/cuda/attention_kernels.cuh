// Attention in tensor cores, a partition of the keys at a time: as FlashAttention-2 (Dao 2023) does it, but
// with sums whose order depends on no tiling. Numbers are sums of bf16 ones, and so no less exact than f32.
#pragma once

#include "cuda/attention_tile.cuh"

namespace engine::cuda {

// c (16, 16) += a (16, 16) · b (16, 16); products of small terms by small ones vanish.
template <int kTermsOfB>
__device__ void add_products(float (&c)[2][4], const uint32_t (&a)[kTerms][kFragment],
                             const SquareTerms<kTermsOfB>& b) {
  for (int tb = 0; tb < kTermsOfB; ++tb)
    for (int ta = 0; ta + tb < kTerms; ++ta)
      for (int n = 0; n < 2; ++n) {
        const uint32_t columns[2] = {b[tb][2 * n], b[tb][2 * n + 1]};
        mma_bf16(c[n], a[ta], columns);
      }
}

using Scores = float[kWarpBlocks][2][4];  // a lane's; a warp has blocks of keys next to each other

__device__ inline int block_of(const Span& span, const Me& me, int b) {
  return span.start / kBlockSize + me.warp * kWarpBlocks + b;
}

// Products of this warp's keys with all queries.
template <class Kv, int kDim>
__device__ void multiply_keys(const Queries& queries, const Cache<Kv>& cache, const Span& span,
                              Room<kDim>& room, Scores& scores) {
  const Me me;
  size_t parts[kWarpBlocks];
  for (int b = 0; b < kWarpBlocks; ++b) {
    parts[b] = span.has(block_of(span, me, b)) ? cache.part(queries, block_of(span, me, b)) : 0;
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) scores[b][n][i] = 0;
  }
  for (int step = 0; step < squares(queries.heads.head_dim); ++step) {
    uint32_t a[kTerms][kFragment];
    load_fragments(room.q, step, me.lane, a);
    for (int b = 0; b < kWarpBlocks; ++b) {
      if (!span.has(block_of(span, me, b))) continue;
      SquareTerms<Kv::kTerms> keys;
      cache.load(parts[b], step, me.lane, keys);
      add_products<Kv::kTerms>(scores[b], a, keys);
    }
  }
}

// Products become scores, those of keys that a row does not see the lowest.
template <class Kv>
__device__ void score(const Queries& queries, const Cache<Kv>& cache, View<const float> slopes,
                      const Span& span, Scores& scores) {
  const Me me;
  for (int b = 0; b < kWarpBlocks; ++b)
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) {
        const int block = block_of(span, me, b), slot = n * kTile + me.column(i), row = me.row(i / 2);
        const int key = block * kBlockSize + slot;
        float& x = scores[b][n][i];
        if (row >= queries.tile.rows || !span.has(block) || !queries.sees(row, key)) {
          x = kLowest;
          continue;
        }
        x *= queries.heads.scale;
        if constexpr (Kv::kScaled)
          x *= cache.scale(cache.part(queries, block), queries.heads.head_dim, false, slot);
        if (slopes)
          x = fmaf(slopes[static_cast<size_t>(queries.head(row))],
                   static_cast<float>(key - queries.position(row)), x);
      }
}

// The greatest score of each of this lane's rows, or the sum of its weights: over the warp's keys.
template <class Combine>
__device__ void reduce_rows(const Scores& scores, Combine combine, float (&rows)[2]) {
  for (int b = 0; b < kWarpBlocks; ++b)
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) rows[i / 2] = combine(rows[i / 2], scores[b][n][i]);
  for (float& row : rows)
    for (int distance = 1; distance < 4; distance *= 2)
      row = combine(row, __shfl_xor_sync(~0u, row, distance));
}

// Combines what the warps have of each row.
template <class Combine>
__device__ void reduce_warps(Shared<float, kWarps * kTileRows>& shared, Combine combine, float (&rows)[2]) {
  const Me me;
  if (me.lane % 4 == 0)
    for (int upper = 0; upper < 2; ++upper) shared[me.warp * kTileRows + me.row(upper)] = rows[upper];
  __syncthreads();
  for (int upper = 0; upper < 2; ++upper) {
    rows[upper] = shared[me.row(upper)];
    for (int w = 1; w < kWarps; ++w)
      rows[upper] = combine(rows[upper], shared[w * kTileRows + me.row(upper)]);
  }
}

// A block's weights as fragments: a lane's results are what it has of a left operand.
template <int kDim>
__device__ void store_weights(float (&weights)[2][4], int block, int lane, Room<kDim>& room) {
  for (int term = 0; term < kTerms; ++term)
    for (int word = 0; word < kFragment; ++word) {
      float* pair = &weights[word / 2][word % 2 * 2];
      const int step = term * (kPartition / kBlockSize) + block;
      room.weights[(step * kWarpSize + lane) * kFragment + word] = split_pair(pair[0], pair[1]);
    }
}

// Weights of bytes become those of the integers; a row leaves out the scale of a value that it does not see:
// it may be no number.
template <class Kv>
__device__ void scale_weights(const Queries& queries, const Cache<Kv>& cache, const Span& span,
                              Scores& weights) {
  const Me me;
  for (int b = 0; b < kWarpBlocks; ++b) {
    const int block = block_of(span, me, b);
    if (!span.has(block)) continue;
    const size_t part = cache.part(queries, block);
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i)
        if (weights[b][n][i] != 0)
          weights[b][n][i] *= cache.scale(part, queries.heads.head_dim, true, n * kTile + me.column(i));
  }
}

// Scores become weights, and lie as fragments in the room.
template <class Kv, int kDim>
__device__ void weigh(const Queries& queries, const Cache<Kv>& cache, const Span& span, Scores& scores,
                      Room<kDim>& room, Weighing (&rows)[2]) {
  const Me me;
  float greatest[2] = {kLowest, kLowest}, sum[2] = {};
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto add = [](float a, float b) { return a + b; };
  reduce_rows(scores, larger, greatest);
  reduce_warps(room.greatest, larger, greatest);
  for (int b = 0; b < kWarpBlocks; ++b)
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) {
        float& x = scores[b][n][i];
        x = x == kLowest ? 0 : exp_f32(x - greatest[i / 2]);
      }
  reduce_rows(scores, add, sum);
  if constexpr (Kv::kScaled) scale_weights(queries, cache, span, scores);
  for (int b = 0; b < kWarpBlocks; ++b) store_weights(scores[b], me.warp * kWarpBlocks + b, me.lane, room);
  reduce_warps(room.sum, add, sum);
  for (int upper = 0; upper < 2; ++upper) rows[upper] = {greatest[upper], sum[upper]};
}

// Values of the first `keys` keys of a square; zeros in place of what nobody has written yet.
template <int kTermsOfB>
__device__ void keep_first(int keys, int lane, SquareTerms<kTermsOfB>& values) {
  for (int half = 0; half < 2; ++half) {
    const int key = 8 * half + lane % 4 * 2;
    const uint32_t mask = (key < keys ? 0xffffu : 0) | (key + 1 < keys ? 0xffff0000u : 0);
    for (int term = 0; term < kTermsOfB; ++term)
      for (int n = 0; n < 2; ++n) values[term][2 * n + half] &= mask;
  }
}

// acc = Σ weight · value over the span's keys, in ascending order.
template <class Kv, int kDim>
__device__ void multiply_values(const Queries& queries, const Cache<Kv>& cache, const Span& span,
                                Room<kDim>& room, Sums<kDim>& acc) {
  const Me me;
  const int num_squares = squares(queries.heads.head_dim);
  for (int block = span.first_block; block < span.end_block; ++block) {
    const size_t part = cache.part(queries, block);
    uint32_t a[kTerms][kFragment];
    load_fragments(room.weights, block - span.start / kBlockSize, me.lane, a);
    for (int s = 0; s < static_cast<int>(sizeof acc / sizeof acc[0]); ++s) {
      const int square = me.warp + s * kWarps;
      if (square >= num_squares) continue;
      SquareTerms<Kv::kTerms> values;
      cache.load(part, num_squares + square, me.lane, values);
      keep_first<Kv::kTerms>(span.end - block * kBlockSize, me.lane, values);
      add_products<Kv::kTerms>(acc[s], a, values);
    }
  }
}

// visit(row, d, upper, x) with each of this lane's numbers of the tile's result.
template <size_t kSquares, class Visit>
__device__ void each_number(const Queries& queries, float (&sums)[kSquares][2][4], Visit visit) {
  const Me me;
  for (int s = 0; s < static_cast<int>(kSquares); ++s)
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) {
        const int d = (me.warp + s * kWarps) * kSquare + n * kTile + me.column(i), row = me.row(i / 2);
        if (row < queries.tile.rows && d < queries.heads.head_dim) visit(row, d, i / 2, sums[s][n][i]);
      }
}

template <int kDim>
__device__ void write_partial(const Queries& queries, View<float> state, const Weighing (&rows)[2],
                              Sums<kDim>& acc) {
  const Me me;
  if (me.warp == 0 && me.lane % 4 == 0)
    for (int upper = 0; upper < 2; ++upper) {
      state[static_cast<size_t>(me.row(upper))] = rows[upper].greatest;
      state[static_cast<size_t>(kTileRows + me.row(upper))] = rows[upper].sum;
    }
  each_number(queries, acc, [&](int row, int d, int, float x) {
    state[static_cast<size_t>(2 * kTileRows + row * queries.heads.head_dim + d)] = x;
  });
}

// total = total combined with a partition.
template <size_t kSquares>
__device__ void merge_into(Weighing (&total_rows)[2], float (&total)[kSquares][2][4],
                           const Weighing (&rows)[2], const float (&acc)[kSquares][2][4]) {
  for (int upper = 0; upper < 2; ++upper) {
    const Merge m = merge(total_rows[upper], rows[upper]);
    total_rows[upper] = {m.greatest, m.sum};
    for (int s = 0; s < static_cast<int>(kSquares); ++s)
      for (int n = 0; n < 2; ++n)
        for (int i = 2 * upper; i < 2 * upper + 2; ++i)
          total[s][n][i] = merged(m, total[s][n][i], acc[s][n][i]);
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
  const Queries queries{tiles[static_cast<size_t>(piece.tile)], heads, static_cast<int>(blockIdx.y)};
  const bool apart = queries.tile.partial >= 0;
  load_queries<Kv, kDim>(queries, qkv, room);
  __syncthreads();
  Weighing total_rows[2] = {{kLowest, 0}, {kLowest, 0}};
  Sums<kDim> total = {};
  for (int p = piece.first_partition; p < piece.end_partition; ++p) {
    const Span span = queries.span(p);
    Scores scores;
    multiply_keys<Kv, kDim>(queries, cache, span, room, scores);
    score(queries, cache, slopes, span, scores);
    Weighing rows[2];
    weigh<Kv, kDim>(queries, cache, span, scores, room, rows);
    Sums<kDim> acc = {};
    multiply_values<Kv, kDim>(queries, cache, span, room, acc);
    if (apart)
      write_partial<kDim>(queries, partials.from(queries.partial_start(p)), rows, acc);
    else
      merge_into(total_rows, total, rows, acc);
  }
  if (!apart)
    each_number(queries, total, [&](int row, int d, int upper, float x) {
      const size_t start = queries.start(row, heads.q_heads * heads.head_dim);
      out[start + static_cast<size_t>(d)] = x / total_rows[upper].sum;
    });
}

// Combines the partitions of a tile that were computed apart. A block for each (tile, key/value head, row).
__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(Heads heads, View<const AttentionTile> tiles, View<const int32_t> split_tiles,
                   View<const float> partials, View<float> out) {
  if (split_tiles[blockIdx.x] < 0) return;
  const Queries queries{tiles[static_cast<size_t>(split_tiles[blockIdx.x])], heads,
                        static_cast<int>(blockIdx.y)};
  const int row = static_cast<int>(blockIdx.z);
  if (row >= queries.tile.rows) return;
  const View<float> result = out.from(queries.start(row, heads.q_heads * heads.head_dim));
  for (int d = static_cast<int>(threadIdx.x); d < heads.head_dim; d += kThreads) {
    Weighing total{kLowest, 0};
    float sum = 0;
    for (int p = queries.tile.first_partition; p < queries.tile.end_partition; ++p) {
      const View<const float> state = partials.from(queries.partial_start(p));
      const Merge m =
          merge(total, {state[static_cast<size_t>(row)], state[static_cast<size_t>(kTileRows + row)]});
      sum = merged(m, sum, state[static_cast<size_t>(2 * kTileRows + row * heads.head_dim + d)]);
      total = {m.greatest, m.sum};
    }
    result[static_cast<size_t>(d)] = sum / total.sum;
  }
}

}  // namespace engine::cuda
