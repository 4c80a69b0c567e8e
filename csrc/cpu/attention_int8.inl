// Attention over a cache of bytes, in integers: scores are dot products of bytes, and so are the sums of
// values. Each key and each value has a scale, as has each query, and each row's softmax weights within a
// partition.
//
// A few numbers of a key are far larger than the others and would cost those their bits, so keys and queries
// are first rotated by a Hadamard matrix, which spreads them out and leaves every dot product what it was,
// times the matrix's size (as in QuaRot, arXiv 2404.00456). Included by attention.inl.
#pragma once

#include "cpu/attention.h"
#include "cpu/vec_math.inl"

namespace engine {
namespace {

constexpr int kMaxInt8HeadDim = 512;

// Rows that are multiplied together: with kRows the compiler does not keep the sums in registers.
constexpr int kQueryRows = kRows / 2;

// One head's part of a block.
//   keys:   (head_dim / 4, kBlockSize) lanes of four bytes, q + 128; then their scales (kBlockSize)
//   values: (kBlockSize / 4, padded(head_dim)) lanes of four keys' bytes; then their scales (kBlockSize)
struct Int8Head {
  int8_t* keys;
  float* key_scales;
  int8_t* values;
  float* value_scales;

  Int8Head(const std::byte* head, int head_dim)
      : keys(reinterpret_cast<int8_t*>(const_cast<std::byte*>(head))),
        key_scales(reinterpret_cast<float*>(keys + head_dim * kBlockSize)),
        values(reinterpret_cast<int8_t*>(key_scales + kBlockSize)),
        value_scales(reinterpret_cast<float*>(values + padded(head_dim) * kBlockSize)) {}
};

inline Int8Head int8_head(const AttentionTile& tile, int key) {
  const auto block = static_cast<size_t>(tile.block_table[key / kBlockSize]);
  return {tile.cache + block * tile.block_stride, tile.head_dim};
}

// Vectors that are transformed together: the largest power of two that divides their number.
inline int rotated_vectors(int head_dim) {
  const int vectors = head_dim / 16;
  return vectors & -vectors;
}
// What a dot product of two rotated heads is larger by.
inline float rotation_gain(int head_dim) {
  return head_dim % 16 == 0 ? static_cast<float>(16 * rotated_vectors(head_dim)) : 1.0f;
}

// out (head_dim) = the rotated x; heads that do not fill vectors stay as they are.
inline void rotate_head(const float* x, int head_dim, float* out) {
  if (head_dim % 16 != 0) {
    for (int i = 0; i < head_dim; ++i) out[i] = x[i];
    return;
  }
  for (int i = 0; i < head_dim; i += 16)
    store(out + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + i))))));
  for (int h = 16; h < 16 * rotated_vectors(head_dim); h *= 2) {
    for (int i = 0; i < head_dim; i += 16) {
      if (i & h) continue;
      const F32x16 a = load(out + i), b = load(out + i + h);
      store(out + i, a + b);
      store(out + i + h, a - b);
    }
  }
}

// q (n rounded up to 16) = x / scale, rounded, and Σq; returns the scale, a NaN if an x is no finite
// number.
inline float quantise_head(const float* x, int n, int8_t* q, float* sum_of_q = nullptr) {
  const auto vector = [x, n](int i) { return i + 16 <= n ? load(x + i) : load_first(x + i, n - i); };
  I32x16 most_bits = zero_i32();
  for (int i = 0; i < n; i += 16) most_bits = max(bits(vector(i)) & 0x7fffffff, most_bits);
  const int32_t largest = reduce_max(most_bits);
  const float most = __builtin_bit_cast(float, largest);
  const bool finite = largest < 0x7f800000;
  const F32x16 inverse = broadcast(finite && most > kSmallest ? 127.0f / most : 0.0f);
  F32x16 total = zero();
  for (int i = 0; i < n; i += 16) {
    const F32x16 rounded = round(vector(i) * inverse);
    total = total + rounded;
    store_i8(q + i, rounded);
  }
  if (sum_of_q) *sum_of_q = finite ? sum(total) : 0;
  return finite ? most * (1.0f / 127) : __builtin_nanf("");
}

void store_head_int8(const float* key, const float* value, int head_dim, int slot, std::byte* memory) {
  const Int8Head head(memory, head_dim);
  alignas(64) float rotated[kMaxInt8HeadDim];
  alignas(64) int8_t q[kMaxInt8HeadDim];
  rotate_head(key, head_dim, rotated);
  head.key_scales[slot] = quantise_head(rotated, head_dim, q);
  for (int i = 0; i < head_dim; i += 4) {
    int32_t four;
    __builtin_memcpy(&four, q + i, 4);
    four ^= static_cast<int32_t>(0x80808080);
    __builtin_memcpy(head.keys + i * kBlockSize + 4 * slot, &four, 4);
  }
  head.value_scales[slot] = quantise_head(value, head_dim, q);
  int8_t* values = head.values + slot / 4 * 4 * padded(head_dim) + slot % 4;
  for (int i = 0; i < head_dim; ++i) values[4 * i] = q[i];
}

// Queries as bytes: (groups of kRows rows, head_dim / 4, kRows) lanes of four; behind them each row's scale,
// and where its dot products start, -128 Σq.
struct PackedQueries {
  int32_t* q;
  float* scales;
  int32_t* starts;

  PackedQueries(const AttentionTile& tile, const float* packed)
      : q(reinterpret_cast<int32_t*>(const_cast<float*>(packed))),
        scales(reinterpret_cast<float*>(q + row_groups(tile) * kRows * (tile.head_dim / 4))),
        starts(reinterpret_cast<int32_t*>(scales + row_groups(tile) * kRows)) {}

  static int row_groups(const AttentionTile& tile) { return (num_rows(tile) + kRows - 1) / kRows; }
  const int32_t* rows(const AttentionTile& tile, int row) const {
    return q + row / kRows * (kRows * (tile.head_dim / 4)) + row % kRows;
  }
};

void pack_int8(const AttentionTile& tile, float* packed) {
  const PackedQueries out(tile, packed);
  const float scale = tile.scale / rotation_gain(tile.head_dim);
  for (int row = 0; row < num_rows(tile); ++row) {
    const float* query = tile.q + row / tile.group * tile.q_stride + row % tile.group * tile.head_dim;
    alignas(64) float rotated[kMaxInt8HeadDim];
    alignas(64) int8_t q[kMaxInt8HeadDim];
    rotate_head(query, tile.head_dim, rotated);
    float sum_of_q;
    out.scales[row] = quantise_head(rotated, tile.head_dim, q, &sum_of_q) * scale;
    int32_t* words = const_cast<int32_t*>(out.rows(tile, row));
    for (int i = 0; i < tile.head_dim / 4; ++i) __builtin_memcpy(words + i * kRows, q + 4 * i, 4);
    out.starts[row] = -128 * static_cast<int32_t>(sum_of_q);
  }
}

// Scores of rows [row, row + R) with the keys of C blocks from `key` on; scores: at (row, key).
template <int R, int C>
void score_blocks_int8(const AttentionTile& tile, const PackedQueries& queries, int row, int key,
                       float* scores) {
  const int32_t* q = queries.rows(tile, row);
  I32x16 dots[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) dots[r][c] = broadcast_i32(&queries.starts[row + r]);
  const int8_t* keys[C];
  F32x16 scales[C];
  for (int c = 0; c < C; ++c) {
    const Int8Head head = int8_head(tile, key + c * kBlockSize);
    keys[c] = head.keys;
    scales[c] = load(head.key_scales);
  }
#pragma GCC unroll 4
  for (int i = 0; i < tile.head_dim / 4; ++i) {
    I32x16 k[C];
    for (int c = 0; c < C; ++c) k[c] = load_i32(keys[c] + i * 4 * kBlockSize);
    for (int r = 0; r < R; ++r) {
      const I32x16 four = broadcast_i32(q + i * kRows + r);
      for (int c = 0; c < C; ++c) dots[r][c] = add_dot<false>(dots[r][c], k[c], four);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      F32x16 score = to_float(dots[r][c]) * (broadcast(queries.scales[row + r]) * scales[c]);
      if (tile.slopes) score = score + alibi(tile, row + r, key + c * kBlockSize);
      store(scores + r * kPartition + c * kBlockSize, score);
    }
  }
}

// Asks for the values of C blocks and for the keys of the next: few rows use them up faster than memory
// brings them.
template <int C>
inline void prefetch_int8(const AttentionTile& tile, int key) {
  const int64_t keys = (tile.head_dim + 4) * kBlockSize, values = (padded(tile.head_dim) + 4) * kBlockSize;
  for (int c = 0; c < C; ++c) {
    const int8_t* block = int8_head(tile, key + c * kBlockSize).keys;
    for (int64_t line = 0; line < values; line += 64) __builtin_prefetch(block + keys + line);
    const int next = key + (C + c) * kBlockSize;
    if (next >= last_block_end(tile)) continue;
    const int8_t* next_block = int8_head(tile, next).keys;
    for (int64_t line = 0; line < keys; line += 64) __builtin_prefetch(next_block + line);
  }
}

template <int R, int C>
void score_rows_int8(const AttentionTile& tile, const PackedQueries& queries, int row, int begin, int end,
                     float* scores) {
  int key = begin;
  for (; key + C * kBlockSize <= end; key += C * kBlockSize) {
    if constexpr (R <= kFewRows) prefetch_int8<C>(tile, key);
    score_blocks_int8<R, C>(tile, queries, row, key, scores + row * kPartition + key % kPartition);
  }
  for (; key < end; key += kBlockSize)
    score_blocks_int8<R, 1>(tile, queries, row, key, scores + row * kPartition + key % kPartition);
}

void score_int8(const AttentionTile& tile, const float* packed, int begin, int end, float* scores) {
  const PackedQueries queries(tile, packed);
  const int rows = num_rows(tile);
  int row = 0;
  for (; row + kQueryRows <= rows; row += kQueryRows)
    score_rows_int8<kQueryRows, kVectors>(tile, queries, row, begin, end, scores);
  few_rows(row, rows, [&]<int R>(int first) {
    score_rows_int8<R, kFewVectors>(tile, queries, first, begin, end, scores);
  });
}

// A row's keys within a partition, whose first is key 0 here.
struct RowKeys {
  Range own;  // that it sees
  int begin() const { return own.begin / kBlockSize * kBlockSize; }
  int end() const { return padded(own.end); }
  // a for the keys of the block at `key` that the row sees, `rest` for the others.
  F32x16 only(F32x16 a, int key, float rest) const {
    if (key >= own.begin && key + kBlockSize <= own.end) return a;
    return within(a, own.begin - key, own.end - key, rest);
  }
};

inline RowKeys row_keys(const AttentionTile& tile, int row, int partition) {
  const Range own = seen(tile, row / tile.group, partition);
  if (own.begin >= own.end) return {{0, 0}};
  return {{own.begin - partition * kPartition, own.end - partition * kPartition}};
}

inline float max_score(RowKeys keys, const float* scores) {
  F32x16 most = broadcast(-__builtin_inff());
  for (int key = keys.begin(); key < keys.end(); key += kBlockSize)
    most = max(keys.only(load(scores + key), key, -__builtin_inff()), most);
  return reduce_max(most);
}

// Turns scores into e^(score - max) times the values' scales, of which it returns the largest (a NaN if one
// is no finite number); sum_of_weights: of the powers alone.
inline float scaled_weights(RowKeys keys, float max_score, const float* value_scales, float* scores,
                            float* sum_of_weights) {
  const F32x16 log2e = broadcast(1.44269504f), shift = broadcast(max_score);
  F32x16 total = zero();
  I32x16 most_bits = zero_i32();
  for (int key = keys.begin(); key < keys.end(); key += kBlockSize) {
    const F32x16 weight = rough_exp2((load(scores + key) - shift) * log2e);
    const F32x16 scaled = keys.only(weight * load(value_scales + key), key, 0);
    total = total + keys.only(weight, key, 0);
    most_bits = max(bits(scaled), most_bits);
    store(scores + key, scaled);
  }
  *sum_of_weights = sum(total);
  const int32_t largest = reduce_max(most_bits);
  return largest < 0x7f800000 ? __builtin_bit_cast(float, largest) : __builtin_nanf("");
}

// p = weights / largest as bytes for the blocks of keys [begin, end): those that the row does not see get 0.
inline void store_weights(RowKeys keys, const float* weights, float largest, int begin, int end, uint8_t* p) {
  const F32x16 inverse = broadcast(largest > kSmallest ? 255.0f / largest : 0.0f);
  for (int key = begin; key < end; key += kBlockSize) {
    const bool any = key >= keys.begin() && key < keys.end();
    store_u8(p + key, any ? load(weights + key) * inverse : zero());
  }
}

// states[r][16 c..] = scale of row r · Σ p[r][key] · value[key] over keys [begin, end), both multiples of
// kBlockSize.
template <int R, int C>
void weigh_values_int8(const AttentionTile& tile, const uint8_t (*p)[kPartition], const float* scales,
                       int start, int begin, int end, int column, float* states) {
  I32x16 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = zero_i32();
  for (int key = begin; key < end; key += kBlockSize) {
    const int8_t* values = int8_head(tile, key).values + 4 * column;
#pragma GCC unroll 4
    for (int i = 0; i < kBlockSize; i += 4, values += 4 * padded(tile.head_dim)) {
      I32x16 v[C];
      for (int c = 0; c < C; ++c) v[c] = load_i32(values + 64 * c);
      for (int r = 0; r < R; ++r) {
        const I32x16 four = broadcast_i32(p[r] + key - start + i);
        for (int c = 0; c < C; ++c) sums[r][c] = add_dot<false>(sums[r][c], four, v[c]);
      }
    }
  }
  const int stride = row_state_size(tile.head_dim);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      store(states + r * stride + column + 16 * c, to_float(sums[r][c]) * broadcast(scales[r]));
}

template <int R, int C>
void weigh_rows_int8(const AttentionTile& tile, const uint8_t (*p)[kPartition], const float* scales,
                     int start, int begin, int end, float* states) {
  const int columns = padded(tile.head_dim);
  int column = 0;
  for (; column + 16 * C <= columns; column += 16 * C)
    weigh_values_int8<R, C>(tile, p, scales, start, begin, end, column, states);
  for (; column < columns; column += 16)
    weigh_values_int8<R, 1>(tile, p, scales, start, begin, end, column, states);
}

// All rows go over all keys that any of them sees: what a row does not see weighs 0. Each step is taken for
// several rows before the next, since it would wait for its own result.
void attend_partition_int8(const AttentionTile& tile, const float* packed, int partition, float* scores,
                           float* states) {
  const int start = partition * kPartition, size = row_state_size(tile.head_dim);
  const int begin = seen(tile, 0, partition).begin / kBlockSize * kBlockSize;
  const int end = padded(seen(tile, tile.num_tokens - 1, partition).end);
  score_int8(tile, packed, begin, end, scores);
  alignas(64) float value_scales[kPartition];
  for (int key = begin; key < end; key += kBlockSize)
    store(value_scales + key - start, load(int8_head(tile, key).value_scales));
  for (int row = 0; row < num_rows(tile); row += kRows) {
    const int rows = least(kRows, num_rows(tile) - row);
    RowKeys keys[kRows];
    alignas(64) uint8_t p[kRows][kPartition];
    float* row_scores = scores + row * kPartition;
    float* out = states + row * size;
    float scales[kRows];
    const auto state = [&](int r) { return out + (r + 1) * size - kLanes; };
    for (int r = 0; r < rows; ++r) {
      keys[r] = row_keys(tile, row + r, partition);
      state(r)[0] = max_score(keys[r], row_scores + r * kPartition);
    }
    for (int r = 0; r < rows; ++r)
      scales[r] =
          scaled_weights(keys[r], state(r)[0], value_scales, row_scores + r * kPartition, &state(r)[1]);
    for (int r = 0; r < rows; ++r) {
      store_weights(keys[r], row_scores + r * kPartition, scales[r], begin - start, end - start, p[r]);
      scales[r] *= 1.0f / 255;
    }
    int done = 0;
    for (; done + kQueryRows <= rows; done += kQueryRows)
      weigh_rows_int8<kQueryRows, kVectors>(tile, p + done, scales + done, start, begin, end,
                                            out + done * size);
    few_rows(done, rows, [&]<int R>(int first) {
      weigh_rows_int8<R, kFewVectors>(tile, p + first, scales + first, start, begin, end, out + first * size);
    });
  }
}

}  // namespace
}  // namespace engine
