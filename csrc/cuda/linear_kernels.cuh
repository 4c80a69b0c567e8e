// The multiplications themselves. A warp has a panel of 16 weight rows and some tiles of 8 tokens, and goes
// through a slice of the columns at a time; every sum is taken in the same order, whichever kernel takes it.
#pragma once

#include "cuda/linear_activations.cuh"

namespace engine::cuda {

// Matrix instructions of a step: weights of `kFormat` as f32.
template <Format kFormat>
struct Exact {
  using Rows = Terms;
  // bf16 terms that hold a weight: a bf16 is one, an f16 with its 11 bits two, an f32 with its 24 three.
  static constexpr int kWeightTerms = kFormat == Format::BF16 ? 1 : kFormat == Format::F16 ? 2 : 3;

  template <int kTiles>
  __device__ static void step(const Matrix& m, const Terms& x, int panel, int first_tile, int step, int lane,
                              float (&acc)[kTiles][4]) {
    float w[kLaneWeights];
    dequantise<kFormat>(m, panel, step, lane, w);
    for (int wt = 0; wt < kWeightTerms; ++wt) {
      uint32_t a[2][4];  // (half): rows g and g + 8, columns 4t and 4t + 1; then 4t + 2 and 4t + 3
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 4; ++i) {
          const int e = 8 * (i % 2) + 4 * half + i / 2 * 2;
          a[half][i] = split_pair(w[e], w[e + 1]);
        }
      for (int tile = 0; tile < kTiles; ++tile)
        for (int xt = 0; xt + wt < kTerms; ++xt) {
          const uint4 words = x.load(xt, min(first_tile + tile, x.tiles - 1), step, lane);
          const uint32_t b[2][2] = {{words.x, words.y}, {words.z, words.w}};
          for (int half = 0; half < 2; ++half) mma_bf16(acc[tile], a[half], b[half]);
        }
    }
  }
  __device__ static int tiles(const Terms& x) { return x.tiles; }
};

// Matrix instructions of a step, in integers: a group's dot product, corrected for the quants' zero, times
// both scales.
template <Format kFormat>
struct Int8 {
  using Rows = Bytes;
  using S = Stored<kFormat>;

  template <int kTiles>
  __device__ static void step(const Matrix& m, const Bytes& x, int panel, int first_tile, int step, int lane,
                              float (&acc)[kTiles][4]) {
    uint32_t q[4];
    S::load(m, m.tile(panel, step), lane, q);
    const RowScales rows[2] = {S::scales(m, panel, step, lane / 4), S::scales(m, panel, step, lane / 4 + 8)};
    for (int tile = 0; tile < kTiles; ++tile) {
      const size_t at = x.at(min(first_tile + tile, tiles(x) - 1), step);
      const auto words = x.quants.load<uint2>((at * kWarpSize + static_cast<size_t>(lane)) * 8);
      const size_t token = at * kTileTokens + static_cast<size_t>(lane % 4 * 2);
      const auto scales = x.scales.load<float2>(token);
      const auto sums = x.sums.load<int4>(2 * token);  // of two tokens, halves of each
      const uint32_t b[2] = {words.x, words.y};
      const float scale[2] = {scales.x, scales.y};
      const int sum[2][2] = {{sums.x, sums.y}, {sums.z, sums.w}};
      if constexpr (S::kTwoGroups) {
        for (int half = 0; half < 2; ++half) {
          int dot[4] = {};
          const uint32_t a[2] = {q[2 * half], q[2 * half + 1]};
          mma_u8s8_k16(dot, a, b[half]);
          for (int i = 0; i < 4; ++i)
            acc[tile][i] = fmaf(rows[i / 2].scale[half] * scale[i % 2],
                                static_cast<float>(dot[i] - S::kZero * sum[i % 2][half]), acc[tile][i]);
        }
      } else {
        int dot[4] = {};
        mma_u8s8_k32(dot, q, b);
        for (int i = 0; i < 4; ++i) {
          const int total = sum[i % 2][0] + sum[i % 2][1];
          acc[tile][i] = fmaf(rows[i / 2].scale[0] * scale[i % 2],
                              static_cast<float>(dot[i] - S::kZero * total), acc[tile][i]);
          if constexpr (S::kHasOffset)
            acc[tile][i] = fmaf(rows[i / 2].offset * scale[i % 2], static_cast<float>(total), acc[tile][i]);
        }
      }
    }
  }
  __device__ static int tiles(const Bytes& x) { return x.tiles; }
};

struct Result {
  View<float> y;           // (n, height)
  View<const float> bias;  // (rows of the weight) or none
  int height;              // rows of each of the weight's matrices
  int first_row, rows;     // of the weight, that are this segment's
  Tokens tokens;

  // The segment's rows that belong to a matrix; where the first is not below the last, none do.
  __device__ int begin(int matrix) const { return max(matrix * height - first_row, 0); }
  __device__ int end(int matrix) const { return min((matrix + 1) * height - first_row, rows); }
};

// The i-th panel with rows of the matrix that a tile is multiplied by; -1: there is none.
__device__ inline int panel_of(const Result& out, int tile, int i) {
  const int matrix = out.tokens.matrix(tile);
  if (matrix < 0) return -1;
  const int panel = out.begin(matrix) / kPanelRows + i;
  return panel * kPanelRows < out.end(matrix) ? panel : -1;
}

// A lane's sums: rows g and g + 8 of the panel, tokens 2t and 2t + 1 of each tile.
template <int kTiles>
__device__ void store(const Result& out, int panel, int first_tile, int lane,
                      const float (&sums)[kTiles][4]) {
  const int matrix = out.tokens.matrix(first_tile), begin = out.begin(matrix), end = out.end(matrix);
  for (int tile = 0; tile < kTiles; ++tile)
    for (int i = 0; i < 4; ++i) {
      const int row = panel * kPanelRows + lane / 4 + i / 2 * 8;
      const int to = out.tokens.row((first_tile + tile) * kTileTokens + lane % 4 * 2 + i % 2);
      if (row < begin || row >= end || to < 0) continue;
      const int of_weight = out.first_row + row;
      const float bias = out.bias ? out.bias[static_cast<size_t>(of_weight)] : -0.0f;
      out.y[static_cast<size_t>(to) * static_cast<size_t>(out.height) +
            static_cast<size_t>(of_weight - matrix * out.height)] = sums[tile][i] + bias;
    }
}

template <class Route, int kTiles>
__device__ void multiply_slice(const Matrix& m, const typename Route::Rows& x, int panel, int first_tile,
                               int slice, int lane, float (&acc)[kTiles][4]) {
  for (int tile = 0; tile < kTiles; ++tile)
    for (int i = 0; i < 4; ++i) acc[tile][i] = 0;
  const int end = min((slice + 1) * kSliceSteps, m.steps);
  for (int step = slice * kSliceSteps; step < end; ++step)
    Route::template step<kTiles>(m, x, panel, first_tile, step, lane, acc);
}

inline constexpr int kNarrowWarps = 8, kWideWarps = 4;

// For few tokens, when reading the weights takes the time: a block has one panel, and its warps share the
// slices.
template <class Route, int kTiles>
__global__ void __launch_bounds__(kNarrowWarps* kWarpSize, 1)
    narrow_kernel(Matrix m, typename Route::Rows x, Result out) {
  constexpr int kSums = kTiles * 4 * kWarpSize;
  __shared__ Shared<float, kNarrowWarps * kSums> partial;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first_tile = static_cast<int>(blockIdx.y) * kTiles;
  const int panel = panel_of(out, first_tile, static_cast<int>(blockIdx.x));
  if (panel < 0) return;
  const int slices = (m.steps + kSliceSteps - 1) / kSliceSteps;
  float total[kTiles][4] = {};
  for (int first = 0; first < slices; first += kNarrowWarps) {
    if (first + warp < slices) {
      float acc[kTiles][4];
      multiply_slice<Route, kTiles>(m, x, panel, first_tile, first + warp, lane, acc);
      for (int tile = 0; tile < kTiles; ++tile)
        for (int i = 0; i < 4; ++i) partial[warp * kSums + (tile * 4 + i) * kWarpSize + lane] = acc[tile][i];
    }
    __syncthreads();
    if (warp == 0)
      for (int w = 0; w < min(kNarrowWarps, slices - first); ++w)
        for (int tile = 0; tile < kTiles; ++tile)
          for (int i = 0; i < 4; ++i)
            total[tile][i] += partial[w * kSums + (tile * 4 + i) * kWarpSize + lane];
    __syncthreads();
  }
  if (warp == 0) store<kTiles>(out, panel, first_tile, lane, total);
}

// For many tokens: each warp has a panel of its own and goes through all slices.
template <class Route, int kTiles>
__global__ void __launch_bounds__(kWideWarps* kWarpSize, 1)
    wide_kernel(Matrix m, typename Route::Rows x, Result out) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first_tile = static_cast<int>(blockIdx.y) * kTiles;
  const int panel = panel_of(out, first_tile, static_cast<int>(blockIdx.x) * kWideWarps + warp);
  if (panel < 0) return;
  const int slices = (m.steps + kSliceSteps - 1) / kSliceSteps;
  float total[kTiles][4] = {};
  for (int slice = 0; slice < slices; ++slice) {
    float acc[kTiles][4];
    multiply_slice<Route, kTiles>(m, x, panel, first_tile, slice, lane, acc);
    for (int tile = 0; tile < kTiles; ++tile)
      for (int i = 0; i < 4; ++i) total[tile][i] += acc[tile][i];
  }
  store<kTiles>(out, panel, first_tile, lane, total);
}

}  // namespace engine::cuda
