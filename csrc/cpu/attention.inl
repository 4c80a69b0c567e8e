// Attention's inner loops over F32x16. Included by isa_*.cpp; see attention.h for what each does.
#pragma once

#include "cpu/attention.h"
#include "cpu/vec_math.inl"

namespace engine {
namespace {

struct F32Cache {
  using Number = float;
  static F32x16 get(const float* p) { return load(p); }
  static void put(float* p, F32x16 a) { store(p, a); }
};
struct F16Cache {
  using Number = uint16_t;
  static F32x16 get(const uint16_t* p) { return load_f16(p); }
  static void put(uint16_t* p, F32x16 a) { store_f16(p, a); }
};
struct BF16Cache {
  using Number = uint16_t;
  static F32x16 get(const uint16_t* p) { return load_bf16(p); }
  static void put(uint16_t* p, F32x16 a) { store_bf16(p, a); }
};

// Rows that are multiplied together, and the vectors that they are multiplied with: the accumulators fill the
// registers.
inline constexpr int kRows = kTileSums >= 24 ? 12 : 6, kVectors = kTileSums >= 24 ? 2 : 1;
inline constexpr int kFewRows = kTileSums >= 24 ? 4 : 2, kFewVectors = kTileSums >= 24 ? 4 : 2;

static_assert(kPackedRows % kRows == 0);

// Calls run<R>(row) for rows [row, end_row), at most kFewRows at a time: each loads keys and values once for
// all R.
template <int R = kFewRows, class Run>
[[gnu::always_inline]] inline void few_rows(int row, int end_row, Run run) {
  for (; row + R <= end_row; row += R) run.template operator()<R>(row);
  if constexpr (R > 1) few_rows<R - 1>(row, end_row, run);
}

inline int num_rows(const AttentionTile& tile) {
  return tile.num_tokens * tile.group;
}

// The end of the keys that the tile's block table has blocks for.
inline int last_block_end(const AttentionTile& tile) {
  return padded(tile.first_position + tile.num_tokens);
}

template <class Cache>
const typename Cache::Number* keys_of(const AttentionTile& tile, int key) {
  const auto block = static_cast<size_t>(tile.block_table[key / kBlockSize]);
  return reinterpret_cast<const typename Cache::Number*>(tile.cache + block * tile.block_stride);
}
template <class Cache>
const typename Cache::Number* values_of(const AttentionTile& tile, int key) {
  return keys_of<Cache>(tile, key) + tile.head_dim * kBlockSize;
}

template <class Cache>
void store_head(const float* key, const float* value, int head_dim, int slot, std::byte* head) {
  auto* keys = reinterpret_cast<typename Cache::Number*>(head);
  auto* values = keys + head_dim * kBlockSize + slot * padded(head_dim);
  typename Cache::Number lanes[16];
  for (int i = 0; i < head_dim; i += 16) {
    const int rest = head_dim - i < 16 ? head_dim - i : 16;
    Cache::put(values + i, load_first(value + i, rest));
    Cache::put(lanes, load_first(key + i, rest));
    for (int j = 0; j < rest; ++j) keys[(i + j) * kBlockSize + slot] = lanes[j];
  }
}

// sums[r][c] += Σ a[r * kRowStride + i * kStep] * vector(i, c) for i in [begin, end), in ascending order.
template <int R, int C, int kRowStride, int kStep, class Vector>
[[gnu::always_inline]] inline void multiply_add(F32x16 (&sums)[R][C], const float* a, int begin, int end,
                                                Vector vector) {
  for (int i = begin; i < end; ++i) {
    F32x16 v[C];
    for (int c = 0; c < C; ++c) v[c] = vector(i, c);
    for (int r = 0; r < R; ++r) {
      const F32x16 factor = broadcast(a[r * kRowStride + i * kStep]);
      for (int c = 0; c < C; ++c) sums[r][c] = fma(factor, v[c], sums[r][c]);
    }
  }
}

// packed (groups of kRows rows, head_dim, kRows).
void pack(const AttentionTile& tile, float* packed) {
  for (int row = 0; row < num_rows(tile); ++row) {
    const float* q = tile.q + row / tile.group * tile.q_stride + row % tile.group * tile.head_dim;
    float* out = packed + row / kRows * (kRows * tile.head_dim) + row % kRows;
    for (int d = 0; d < tile.head_dim; ++d) out[d * kRows] = q[d];
  }
}

// slope * (position of key - position of query) for the sixteen keys from `key` on.
inline F32x16 alibi(const AttentionTile& tile, int row, int key) {
  static constexpr float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int distance = key - (tile.first_position + row / tile.group);
  return broadcast(tile.slopes[row % tile.group]) * (broadcast(static_cast<float>(distance)) + load(lanes));
}

// Scores of rows [row, row + R) with the keys of C blocks from `key` on. packed: at `row`; scores: at (row,
// key).
template <class Cache, int R, int C>
void score_blocks(const AttentionTile& tile, const float* packed, int row, int key, float* scores) {
  const typename Cache::Number* keys[C];
  for (int c = 0; c < C; ++c) keys[c] = keys_of<Cache>(tile, key + c * kBlockSize);
  F32x16 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = zero();
  multiply_add<R, C, 1, kRows>(sums, packed, 0, tile.head_dim,
                               [&](int d, int c) { return Cache::get(keys[c] + d * kBlockSize); });
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      F32x16 score = sums[r][c] * broadcast(tile.scale);
      if (tile.slopes) score = score + alibi(tile, row + r, key + c * kBlockSize);
      store(scores + r * kPartition + c * kBlockSize, score);
    }
  }
}

// Asks for the values of C blocks, which come next in memory, and for the keys behind them: few rows use them
// up faster than memory brings them.
template <class Cache, int C>
inline void prefetch_blocks(const AttentionTile& tile, int key, int end) {
  const size_t bytes = static_cast<size_t>(tile.head_dim * kBlockSize) * sizeof(typename Cache::Number);
  for (int c = 0; c < C; ++c) {
    const auto* values = reinterpret_cast<const char*>(values_of<Cache>(tile, key + c * kBlockSize));
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(values + line);
    const int next = key + (C + c) * kBlockSize;
    if (next >= end) continue;
    const auto* keys = reinterpret_cast<const char*>(keys_of<Cache>(tile, next));
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(keys + line);
  }
}

template <class Cache, int R, int C>
void score_rows(const AttentionTile& tile, const float* packed, int row, int begin, int end, float* scores) {
  const float* queries = packed + row / kRows * (kRows * tile.head_dim) + row % kRows;
  int key = begin;
  for (; key + C * kBlockSize <= end; key += C * kBlockSize) {
    if constexpr (R <= kFewRows) prefetch_blocks<Cache, C>(tile, key, last_block_end(tile));
    score_blocks<Cache, R, C>(tile, queries, row, key, scores + row * kPartition + key % kPartition);
  }
  for (; key < end; key += kBlockSize)
    score_blocks<Cache, R, 1>(tile, queries, row, key, scores + row * kPartition + key % kPartition);
}

// Keys [begin, end), both multiples of kBlockSize, for all rows.
template <class Cache>
void score(const AttentionTile& tile, const float* packed, int begin, int end, float* scores) {
  const int rows = num_rows(tile);
  int row = 0;
  for (; row + kRows <= rows; row += kRows)
    score_rows<Cache, kRows, kVectors>(tile, packed, row, begin, end, scores);
  few_rows(row, rows, [&]<int R>(int first) {
    score_rows<Cache, R, kFewVectors>(tile, packed, first, begin, end, scores);
  });
}

// Turns the scores [begin, end) of one row into e^(score - max), the rest of their blocks into 0.
void softmax(float* scores, int begin, int end, float* state_max, float* state_sum) {
  const int first_block = begin / kBlockSize * kBlockSize, end_block = padded(end);
  for (int i = first_block; i < begin; ++i) scores[i] = -__builtin_inff();
  for (int i = end; i < end_block; ++i) scores[i] = -__builtin_inff();
  F32x16 most = broadcast(-__builtin_inff());
  for (int i = first_block; i < end_block; i += 16) most = max(load(scores + i), most);
  *state_max = reduce_max(most);
  const F32x16 shift = broadcast(*state_max);
  F32x16 total = zero();
  for (int i = first_block; i < end_block; i += 16) {
    const F32x16 weight = exp(load(scores + i) - shift);
    store(scores + i, weight);
    total = total + weight;
  }
  *state_sum = sum(total);
}

// states[r][16 c..] += Σ weights[r][key] * value[key] for keys [begin, end), R rows, C vectors from `column`
// on.
template <class Cache, int R, int C>
void weigh_values(const AttentionTile& tile, const float* weights, int begin, int end, int column,
                  float* states) {
  const int stride = row_state_size(tile.head_dim), value_stride = padded(tile.head_dim);
  F32x16 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = load(states + r * stride + column + 16 * c);
  for (int key = begin; key < end;) {
    const int block = key / kBlockSize * kBlockSize;
    const int stop = block + kBlockSize < end ? block + kBlockSize : end;
    const typename Cache::Number* values = values_of<Cache>(tile, key) + column;
    multiply_add<R, C, kPartition, 1>(
        sums, weights + block % kPartition, key - block, stop - block,
        [&](int i, int c) { return Cache::get(values + i * value_stride + 16 * c); });
    key = stop;
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(states + r * stride + column + 16 * c, sums[r][c]);
}

template <class Cache, int R, int C>
void weigh_rows(const AttentionTile& tile, const float* scores, int row, int begin, int end, float* states) {
  const int columns = padded(tile.head_dim);
  const float* weights = scores + row * kPartition;
  float* rows = states + row * row_state_size(tile.head_dim);
  int column = 0;
  for (; column + 16 * C <= columns; column += 16 * C)
    weigh_values<Cache, R, C>(tile, weights, begin, end, column, rows);
  for (; column < columns; column += 16) weigh_values<Cache, R, 1>(tile, weights, begin, end, column, rows);
}

// Keys [begin, end) for rows [row, end_row).
template <class Cache>
void weigh(const AttentionTile& tile, const float* scores, int row, int end_row, int begin, int end,
           float* states) {
  if (begin >= end) return;
  for (; row + kRows <= end_row; row += kRows)
    weigh_rows<Cache, kRows, kVectors>(tile, scores, row, begin, end, states);
  few_rows(row, end_row, [&]<int R>(int first) {
    weigh_rows<Cache, R, kFewVectors>(tile, scores, first, begin, end, states);
  });
}

struct Range {
  int begin, end;
};
inline int least(int a, int b) {
  return a < b ? a : b;
}
inline int most(int a, int b) {
  return a > b ? a : b;
}

// The keys of a partition that a token of the tile sees; end <= begin when there are none.
inline Range seen(const AttentionTile& tile, int token, int partition) {
  const int position = tile.first_position + token, start = partition * kPartition;
  const int oldest = tile.window > 0 ? position - tile.window + 1 : 0;
  return {most(start, oldest), least(start + kPartition, position + 1)};
}

// Values of the keys that all tokens of the tile see are read once for all of them; each token's own keys
// before those (its window begins earlier) and after (it is a later token) stand alone. Every row adds its
// keys in ascending order.
template <class Cache>
void weigh_seen(const AttentionTile& tile, int partition, float* scores, float* states) {
  const Range earliest = seen(tile, 0, partition), latest = seen(tile, tile.num_tokens - 1, partition);
  Range common = {latest.begin, earliest.end};
  if (common.begin >= common.end) common = {latest.end, latest.end};
  for (int t = 0; t < tile.num_tokens; ++t) {
    const Range own = seen(tile, t, partition);
    weigh<Cache>(tile, scores, t * tile.group, (t + 1) * tile.group, own.begin, least(own.end, common.begin),
                 states);
  }
  weigh<Cache>(tile, scores, 0, num_rows(tile), common.begin, common.end, states);
  for (int t = 0; t < tile.num_tokens; ++t) {
    const Range own = seen(tile, t, partition);
    weigh<Cache>(tile, scores, t * tile.group, (t + 1) * tile.group, most(own.begin, common.end), own.end,
                 states);
  }
}

}  // namespace
}  // namespace engine

#include "cpu/attention_int8.inl"

namespace engine {
namespace {

template <class Cache>
void attend_partition(const AttentionTile& tile, const float* packed, int partition, float* scores,
                      float* states) {
  const int begin = seen(tile, 0, partition).begin, end = seen(tile, tile.num_tokens - 1, partition).end;
  score<Cache>(tile, packed, begin / kBlockSize * kBlockSize, padded(end), scores);
  const int size = row_state_size(tile.head_dim);
  for (int row = 0; row < num_rows(tile); ++row) {
    float* state = states + row * size;
    for (int i = 0; i < size; i += 16) store(state + i, zero());
    const Range own = seen(tile, row / tile.group, partition);
    const int start = partition * kPartition;
    if (own.begin < own.end)
      softmax(scores + row * kPartition, own.begin - start, own.end - start, &state[size - kLanes],
              &state[size - kLanes + 1]);
  }
  weigh_seen<Cache>(tile, partition, scores, states);
}

// What both sides of up to sixteen rows shrink by when they are brought to their common maximum, and that.
struct Common {
  float max[16], sum[16], shrink_into[16], shrink_from[16];
};

// `into` and `from`: at the maximum and the sum of the first row. One exponential does for all rows.
inline Common common_scale(const float* into, const float* from, int num_rows, int size) {
  float max_into[16] = {}, sum_into[16] = {}, max_from[16] = {}, sum_from[16] = {};
  for (int row = 0; row < num_rows; ++row) {
    max_into[row] = into[row * size];
    sum_into[row] = into[row * size + 1];
    max_from[row] = from[row * size];
    sum_from[row] = from[row * size + 1];
  }
  const F32x16 common = max(load(max_into), load(max_from));
  const F32x16 shrink_into = exp(load(max_into) - common), shrink_from = exp(load(max_from) - common);
  Common c;
  store(c.max, common);
  store(c.sum, fma(load(sum_from), shrink_from, load(sum_into) * shrink_into));
  store(c.shrink_into, shrink_into);
  store(c.shrink_from, shrink_from);
  return c;
}

// A row that saw nothing on one side keeps the other side's bits.
void combine(float* into, const float* from, int num_rows, int head_dim) {
  const int columns = padded(head_dim), size = row_state_size(head_dim);
  for (int first = 0; first < num_rows; first += 16) {
    const int rows = least(16, num_rows - first);
    const Common c = common_scale(into + columns, from + columns, rows, size);
    for (int row = 0; row < rows; ++row, into += size, from += size) {
      if (from[columns + 1] == 0) continue;
      if (into[columns + 1] == 0) {
        for (int i = 0; i < size; i += 16) store(into + i, load(from + i));
        continue;
      }
      const F32x16 shrink_into = broadcast(c.shrink_into[row]), shrink_from = broadcast(c.shrink_from[row]);
      for (int i = 0; i < columns; i += 16)
        store(into + i, fma(load(from + i), shrink_from, load(into + i) * shrink_into));
      into[columns] = c.max[row];
      into[columns + 1] = c.sum[row];
    }
  }
}

void finish(const float* states, int num_rows, int head_dim, float* out) {
  const int columns = padded(head_dim), size = row_state_size(head_dim);
  for (int row = 0; row < num_rows; ++row, states += size, out += head_dim) {
    const F32x16 share = broadcast(1 / states[columns + 1]);
    int i = 0;
    for (; i + 16 <= head_dim; i += 16) store(out + i, load(states + i) * share);
    if (i < head_dim) store_first(out + i, load(states + i) * share, head_dim - i);
  }
}

void rotate_halves(float* x, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

void rotate_pairs(float* x, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

void rotate(float* x, int num_heads, int head_dim, const float* cos, const float* sin, int half,
            bool interleaved) {
  for (int head = 0; head < num_heads; ++head, x += head_dim)
    interleaved ? rotate_pairs(x, cos, sin, half) : rotate_halves(x, cos, sin, half);
}

constexpr AttentionKernels kAttention = {
    {store_head<F32Cache>, store_head<F16Cache>, store_head<BF16Cache>, store_head_int8},
    {pack, pack, pack, pack_int8},
    {attend_partition<F32Cache>, attend_partition<F16Cache>, attend_partition<BF16Cache>,
     attend_partition_int8},
    combine,
    finish,
    rotate,
};

}  // namespace
}  // namespace engine
