// Activations in the form that linear.cu multiplies: tiles of 8 rows, steps of 32 columns, and in each the
// eight numbers of a lane together, row lane / 4 and columns 16 half + 4 (lane % 4) + i (packed_weight.h).
#pragma once

#include "cuda/weights.cuh"

namespace engine::cuda {

inline constexpr int kTerms = 3;

// Which rows of x and y the tokens of tiles are, and which of a weight's stacked matrices they are multiplied
// by: all rows in order by the only one, or each tile's by its expert's.
struct Tokens {
  int n;                        // rows
  View<const int32_t> experts;  // (tiles), -1: an empty tile; null where there is but one matrix
  View<const int32_t> rows;     // (tiles, 8), -1: none

  // -1: the tile is empty, and its rows are undefined.
  __device__ int matrix(int tile) const { return experts ? experts[static_cast<size_t>(tile)] : 0; }
  // -1: none.
  __device__ int row(int token) const {
    if (experts) return rows[static_cast<size_t>(token)];
    return token < n ? token : -1;
  }
};

struct Terms {                // x = Σ of kTerms bf16 numbers
  View<const uint16_t> data;  // (kTerms, tiles, steps, 32, 8)
  int tiles, steps;

  __device__ uint4 load(int term, int tile, int step, int lane) const {
    const size_t row = (static_cast<size_t>(term) * static_cast<size_t>(tiles) + static_cast<size_t>(tile)) *
                           static_cast<size_t>(steps) +
                       static_cast<size_t>(step);
    return data.load<uint4>((row * kWarpSize + static_cast<size_t>(lane)) * 8);
  }
};

struct Bytes {                 // x = scale · q
  View<const uint8_t> quants;  // (tiles, steps, 32, 8)
  View<const float> scales;    // (tiles, steps, 8)
  View<const int> sums;        // (tiles, steps, 8, 2)
  int tiles, steps;

  __device__ size_t at(int tile, int step) const {
    return static_cast<size_t>(tile) * static_cast<size_t>(steps) + static_cast<size_t>(step);
  }
};

// What this lane has of x (n, cols) in a tile and step; zeros outside.
__device__ inline void load_lane(View<const float> x, const Tokens& tokens, int cols, int tile, int step,
                                 int lane, float (&values)[8]) {
  const int row = tokens.row(tile * kTileTokens + lane / 4);
  for (int i = 0; i < 8; ++i) {
    const int col = step * kStepCols + i / 4 * 16 + lane % 4 * 4 + i % 4;
    const bool inside = row >= 0 && col < cols;
    values[i] =
        inside ? x[static_cast<size_t>(row) * static_cast<size_t>(cols) + static_cast<size_t>(col)] : 0;
  }
}

// A warp for each (step, tile).
__global__ void split_kernel(View<const float> x, View<uint16_t> terms, Tokens tokens, int cols, int tiles,
                             int steps) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, tile = static_cast<int>(blockIdx.y);
  const int step = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / kWarpSize;
  if (step >= steps || tokens.matrix(tile) < 0) return;
  float v[8];
  load_lane(x, tokens, cols, tile, step, lane, v);
  for (int term = 0; term < kTerms; ++term) {
    const size_t row = (static_cast<size_t>(term) * static_cast<size_t>(tiles) + static_cast<size_t>(tile)) *
                           static_cast<size_t>(steps) +
                       static_cast<size_t>(step);
    const uint4 words = {split_pair(v[0], v[1]), split_pair(v[2], v[3]), split_pair(v[4], v[5]),
                         split_pair(v[6], v[7])};
    terms.store((row * kWarpSize + static_cast<size_t>(lane)) * 8, words);
  }
}

// Likewise. The rounding is that of the CPU's kernels: 127 / largest, to nearest even; numbers below 2^-100
// count as zeros; what is no number makes the scale none.
__global__ void quantise_kernel(View<const float> x, View<uint8_t> quants, View<float> scales, View<int> sums,
                                Tokens tokens, int cols, int steps) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, tile = static_cast<int>(blockIdx.y);
  const int step = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / kWarpSize;
  if (step >= steps || tokens.matrix(tile) < 0) return;
  float v[8], most = 0, poison = 0;
  load_lane(x, tokens, cols, tile, step, lane, v);
  for (const float value : v) {
    most = fmaxf(most, fabsf(value));
    poison += value - value;
  }
  for (int distance = 1; distance < 4; distance *= 2) {  // the four lanes of a row
    most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
    poison += __shfl_xor_sync(~0u, poison, distance);
  }
  const float inverse = most > 0x1p-100f && poison == 0 ? 127 / most : 0;
  uint32_t words[2] = {};
  int sum[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int q = poison == 0 ? static_cast<int>(rintf(v[i] * inverse)) : 0;
    words[i / 4] |= static_cast<uint32_t>(q & 255) << (8 * (i % 4));
    sum[i / 4] += q;
  }
  for (int distance = 1; distance < 4; distance *= 2)
    for (int& half : sum) half += __shfl_xor_sync(~0u, half, distance);
  const size_t at = static_cast<size_t>(tile) * static_cast<size_t>(steps) + static_cast<size_t>(step);
  quants.store((at * kWarpSize + static_cast<size_t>(lane)) * 8, uint2{words[0], words[1]});
  if (lane % 4 != 0) return;
  const size_t row = at * kTileTokens + static_cast<size_t>(lane / 4);
  scales[row] = most * (1 / 127.0f) + poison;
  sums.store(2 * row, int2{sum[0], sum[1]});
}

}  // namespace engine::cuda
