// Rotary embeddings, and the keys and values that go into the cache.
#include "base/check.h"
#include "cuda/attention.h"
#include "cuda/common.cuh"
#include "cuda/kv_formats.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;

// Angles in f32 (position * inv_freq) and then cos and sin, as transformers computes them.
__global__ void rotation_kernel(View<const int32_t> positions, View<const float> inv_freq, float factor,
                                View<float> cos_sin, int half, size_t count) {
  const size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const size_t width = static_cast<size_t>(half);
  const float angle = static_cast<float>(positions[i / width]) * inv_freq[i % width];
  cos_sin[2 * i] = cosf(angle) * factor;
  cos_sin[2 * i + 1] = sinf(angle) * factor;
}

struct RopeShape {
  int q_heads, kv_heads, head_dim, half;
  bool interleaved;
  float clip;  // 0: none
};

__device__ void clip_row(View<float> row, int size, float limit) {
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    const float x = row[static_cast<size_t>(i)];
    row[static_cast<size_t>(i)] = x < -limit ? -limit : (x > limit ? limit : x);
  }
}

__device__ void rotate_row(View<float> row, View<const float> cos_sin, const RopeShape& shape) {
  const int pairs = (shape.q_heads + shape.kv_heads) * shape.half;
  for (int i = static_cast<int>(threadIdx.x); i < pairs; i += kThreads) {
    const int head = i / shape.half, pair = i % shape.half;
    const int start = head * shape.head_dim + (shape.interleaved ? 2 * pair : pair);
    const size_t first = static_cast<size_t>(start);
    const size_t second = first + static_cast<size_t>(shape.interleaved ? 1 : shape.half);
    const float cos = cos_sin[static_cast<size_t>(2 * pair)],
                sin = cos_sin[static_cast<size_t>(2 * pair + 1)];
    const float x = row[first], y = row[second];
    row[first] = x * cos - y * sin;
    row[second] = y * cos + x * sin;
  }
}

// A head of the cache in the block that its token belongs to.
template <class Kv>
struct Place {
  View<typename Kv::Stored> numbers;  // (2, kBlockSize, head_dim) keys and values, and their scales
  int slot, head_dim;

  __device__ void store(bool value, int d, float x) const {
    numbers[static_cast<size_t>(((value ? kBlockSize : 0) + slot) * head_dim + d)] = Kv::store(x);
  }
  __device__ void store_scale(bool value, float scale) const {
    const int index = (value ? kBlockSize : 0) + slot;
    numbers.store(static_cast<size_t>(2 * kBlockSize * head_dim + 4 * index), scale);
  }
};

using Scratch = Shared<float, kWarps * kMaxHeadDim>;

// A warp rounds a head to bytes: 127 / largest, to nearest even; numbers below 2^-100 count as zeros; what is
// no number makes the scale none.
template <class Kv>
__device__ void store_bytes(const Place<Kv>& place, View<const float> head, bool value, Scratch& scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int mine = static_cast<int>(threadIdx.x) / kWarpSize * kMaxHeadDim;
  __syncwarp();  // the last head has been read
  for (int d = lane; d < place.head_dim; d += kWarpSize) scratch[mine + d] = head[static_cast<size_t>(d)];
  if (!value) rotate_heads(scratch, mine, 1, 0, place.head_dim, lane, kWarpSize, [] { __syncwarp(); });
  __syncwarp();
  float most = 0, poison = 0;
  for (int d = lane; d < place.head_dim; d += kWarpSize) {
    const float x = scratch[mine + d];
    most = fmaxf(most, fabsf(x));
    poison += x - x;
  }
  most = warp_max(most);
  poison = warp_sum(poison);
  const float inverse = most > 0x1p-100f && poison == 0 ? 127 / most : 0;
  for (int d = lane; d < place.head_dim; d += kWarpSize)
    place.store(value, d, poison == 0 ? scratch[mine + d] * inverse : 0);
  if (lane == 0) place.store_scale(value, most * (1 / 127.0f) + poison);
}

// A block for each token, a warp for each head's key or value.
template <class Kv>
__global__ void rope_store_kernel(View<float> qkv, View<const float> cos_sin, View<const int64_t> slots,
                                  View<typename Kv::Stored> cache, RopeShape shape, int64_t block_numbers,
                                  int64_t head_numbers, int64_t layer_start) {
  __shared__ Scratch scratch;
  const size_t token = blockIdx.x;
  const int row_size = (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim;
  const View<float> row = qkv.from(token * static_cast<size_t>(row_size));
  if (shape.clip > 0) clip_row(row, row_size, shape.clip);
  __syncthreads();
  if (shape.half > 0) rotate_row(row, cos_sin.from(token * static_cast<size_t>(2 * shape.half)), shape);
  __syncthreads();
  if (slots[token] < 0) return;
  const int64_t block = slots[token] / kBlockSize, slot = slots[token] % kBlockSize;
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < 2 * shape.kv_heads; i += kWarps) {
    const bool value = i >= shape.kv_heads;
    const int64_t start = block * block_numbers + layer_start + i % shape.kv_heads * head_numbers;
    const Place<Kv> place{cache.from(static_cast<size_t>(start)), static_cast<int>(slot), shape.head_dim};
    const View<const float> head = row.from(static_cast<size_t>((shape.q_heads + i) * shape.head_dim));
    if constexpr (Kv::kScaled) {
      store_bytes(place, head, value, scratch);
    } else {
      for (int d = static_cast<int>(threadIdx.x) % kWarpSize; d < shape.head_dim; d += kWarpSize)
        place.store(value, d, head[static_cast<size_t>(d)]);
    }
  }
}

}  // namespace

void compute_rotation(cudaStream_t stream, const DeviceBatch& batch, const float* inv_freq, int half,
                      float factor, float* cos_sin) {
  const size_t tokens = static_cast<size_t>(batch.num_tokens), count = tokens * static_cast<size_t>(half);
  launch(stream, blocks_for(count, kThreads), kThreads, rotation_kernel,
         View<const int32_t>(batch.positions, tokens), View<const float>(inv_freq, static_cast<size_t>(half)),
         factor, View<float>(cos_sin, 2 * count), half, count);
}

void rope_store(cudaStream_t stream, const ModelConfig& config, int layer, const DeviceBatch& batch,
                float* qkv, const CudaKvCache& cache) {
  const size_t tokens = static_cast<size_t>(batch.num_tokens), half = config.rope_inv_freq.size();
  const RopeShape shape{config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                        static_cast<int>(half),     config.rope_interleaved,    config.clip_qkv};
  visit_kv_format(cache.format, [&]<class Kv>(Kv) {
    using Stored = typename Kv::Stored;
    launch(stream, static_cast<unsigned>(batch.num_tokens), kThreads, rope_store_kernel<Kv>,
           View<float>(qkv, tokens * static_cast<size_t>(config.qkv_size())),
           View<const float>(batch.cos_sin, 2 * tokens * half), View<const int64_t>(batch.slots, tokens),
           View<Stored>(cache.memory.as<Stored>(), cache.memory.bytes() / sizeof(Stored)), shape,
           cache.block_numbers, cache.head_numbers,
           static_cast<int64_t>(layer) * config.num_key_value_heads * cache.head_numbers);
  });
}

}  // namespace engine::cuda
