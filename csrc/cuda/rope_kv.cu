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

using LaneHead = LanePairs<kMaxHeadDim>;
constexpr int kPairs = kMaxHeadDim / 64;

// visit(x, d) with each number of this lane, those that fill up the head included.
template <class Visit>
__device__ void each_number(LaneHead& x, int head_dim, Visit visit) {
  for (int j = 0; j < kPairs; ++j)
    for (int i = 0; i < 2; ++i) {
      const int d = 2 * (static_cast<int>(threadIdx.x) % kWarpSize) + 64 * j + i;
      if (d < squares(head_dim) * kSquare) visit(x[j][i], d);
    }
}

// x becomes bytes; returns their scale: 127 / largest, to nearest even; numbers below 2^-100 count as zeros;
// what is no number makes the scale none.
__device__ float quantise_head(LaneHead& x, int head_dim) {
  float most = 0, poison = 0;
  each_number(x, head_dim, [&](float& number, int) {
    most = fmaxf(most, fabsf(number));
    poison += number - number;
  });
  most = warp_max(most);
  poison = warp_sum(poison);
  const float inverse = most > 0x1p-100f && poison == 0 ? 127 / most : 0;
  each_number(x, head_dim, [&](float& number, int) { number = poison == 0 ? number * inverse : 0; });
  return most * (1 / 127.0f) + poison;
}

// A value with a number that is none makes its key none and becomes zeros: then whoever sees it gets none,
// and others may multiply it by their weight, which is zero.
template <class Kv>
__device__ void poison_key(LaneHead& key, LaneHead& value, int head_dim) {
  constexpr float too_large = 0x1.ffp127f;  // for a bf16
  bool spoilt = false;
  each_number(value, head_dim,
              [&](float& x, int) { spoilt = spoilt || !(fabsf(Kv::load(Kv::store(x))) < too_large); });
  if (__ballot_sync(~0u, spoilt) == 0) return;
  each_number(key, head_dim, [](float& x, int) { x = NAN; });
  each_number(value, head_dim, [](float& x, int) { x = 0; });
}

// A warp stores a head's key and value in its part of a block.
template <class Kv>
__device__ void store_head(View<typename Kv::Stored> part, int slot, int head_dim, LaneHead& key,
                           LaneHead& value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if constexpr (Kv::kScaled) {
    rotate_head(key, head_dim, lane);
    const float key_scale = quantise_head(key, head_dim), value_scale = quantise_head(value, head_dim);
    if (lane == 0) {
      part.store(static_cast<size_t>(scale_byte(head_dim, false, slot)), key_scale);
      part.store(static_cast<size_t>(scale_byte(head_dim, true, slot)), value_scale);
    }
  } else {
    poison_key<Kv>(key, value, head_dim);
  }
  each_number(key, head_dim,
              [&](float& x, int d) { part[static_cast<size_t>(key_number(slot, d))] = Kv::store(x); });
  each_number(value, head_dim, [&](float& x, int d) {
    part[static_cast<size_t>(value_number(head_dim, slot, d))] = Kv::store(x);
  });
}

// A block for each token, a warp for each head.
template <class Kv>
__global__ void rope_store_kernel(View<float> qkv, View<const float> cos_sin, View<const int64_t> slots,
                                  View<typename Kv::Stored> cache, RopeShape shape, int64_t block_numbers,
                                  int64_t head_numbers, int64_t layer_start) {
  const size_t token = blockIdx.x;
  const int row_size = (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim;
  const View<float> row = qkv.from(token * static_cast<size_t>(row_size));
  if (shape.clip > 0) clip_row(row, row_size, shape.clip);
  __syncthreads();
  if (shape.half > 0) rotate_row(row, cos_sin.from(token * static_cast<size_t>(2 * shape.half)), shape);
  __syncthreads();
  if (slots[token] < 0) return;
  const int64_t block = slots[token] / kBlockSize, slot = slots[token] % kBlockSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int head = warp; head < shape.kv_heads; head += kWarps) {
    const int key_head = shape.q_heads + head;
    LaneHead key, value;
    load_head(row.from(static_cast<size_t>(key_head * shape.head_dim)), shape.head_dim, lane, key);
    load_head(row.from(static_cast<size_t>((key_head + shape.kv_heads) * shape.head_dim)), shape.head_dim,
              lane, value);
    const int64_t part = block * block_numbers + layer_start + head * head_numbers;
    store_head<Kv>(cache.from(static_cast<size_t>(part)), static_cast<int>(slot), shape.head_dim, key, value);
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
