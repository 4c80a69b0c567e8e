#include "cuda/experts.h"

#include <string>

#include "base/check.h"
#include "cuda/select.cuh"

namespace engine::cuda {
namespace {

constexpr int kMostExperts = 1024;  // that a block of threads can count
constexpr int kRouteWarps = 4;
constexpr int kElementThreads = 256;

// A warp for each row. An expert is the greatest of those behind the one before it in their order, so no
// number is chosen twice and none is out of range, whatever the scores are. The sums are the CPU's.
__global__ void route_kernel(View<const float> scores, View<int32_t> experts, View<float> shares, int n,
                             int num_experts, int per_row, bool normalise) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / kWarpSize;
  if (row >= n) return;
  const View<const float> score = scores.from(static_cast<size_t>(row) * static_cast<size_t>(num_experts));
  const size_t first = static_cast<size_t>(row) * static_cast<size_t>(per_row);
  float largest = 0, sum = 0;
  uint64_t last = 0;
  for (int j = 0; j < per_row; ++j) {
    uint64_t best = 0;
    for (int e = lane; e < num_experts; e += kWarpSize) {
      const uint64_t bits = Ranked{order_of(score[static_cast<size_t>(e)]), e}.bits();
      if ((j == 0 || bits < last) && bits > best) best = bits;
    }
    last = warp_combine(best, Greater());
    const int32_t expert = Ranked::from(last).token;
    const float x = score[static_cast<size_t>(expert)];
    if (j == 0) largest = x;
    const float share = exp_f32(x - largest);
    sum += share;
    if (lane != 0) continue;
    experts[first + static_cast<size_t>(j)] = expert;
    shares[first + static_cast<size_t>(j)] = share;
  }
  if (lane != 0) return;
  if (!normalise) {
    sum = 0;
    for (int e = 0; e < num_experts; ++e) sum += exp_f32(score[static_cast<size_t>(e)] - largest);
  }
  for (int j = 0; j < per_row; ++j) shares[first + static_cast<size_t>(j)] /= sum;
}

__device__ int groups_of(int choices, int group) {
  return (choices + group - 1) / group;
}

// A block for each expert puts its choices, in ascending order, into groups of tiles behind those of the
// experts before it.
__global__ void group_kernel(View<const int32_t> experts, View<int32_t> tile_experts,
                             View<int32_t> tile_choices, int num_choices, int num_experts, int group,
                             int num_tiles) {
  __shared__ Shared<int, kMostExperts> counts;
  __shared__ Shared<int, kWarps> partial;
  const int expert = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  for (int e = thread; e < num_experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  for (int i = thread; i < num_choices; i += kThreads) counts.add(experts[static_cast<size_t>(i)], 1);
  __syncthreads();
  int before = 0;
  for (int e = thread; e < expert; e += kThreads) before += groups_of(counts[e], group);
  const int first = group * block_combine(before, partial, Plus());

  int found = 0;
  for (int start = 0; start < num_choices; start += kThreads) {
    const int i = start + thread;
    const bool mine = i < num_choices && experts[static_cast<size_t>(i)] == expert;
    const unsigned votes = __ballot_sync(~0u, mine);
    __syncthreads();  // what was there has been read
    if (lane == 0) partial[warp] = __popc(votes);
    __syncthreads();
    int at = first + found + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      const int count = partial[w];
      if (w < warp) at += count;
      found += count;
    }
    if (mine) tile_choices[static_cast<size_t>(at)] = i;
  }

  const int end = first + group * groups_of(found, group);
  for (int i = first + found + thread; i < end; i += kThreads) tile_choices[static_cast<size_t>(i)] = -1;
  const int last_tile = expert == num_experts - 1 ? num_tiles : end / kTileTokens;
  for (int t = first / kTileTokens + thread; t < last_tile; t += kThreads)
    tile_experts[static_cast<size_t>(t)] = t < end / kTileTokens ? expert : -1;
}

// A thread for each number of `out` (n · per_row, size).
__global__ void dispatch_kernel(View<const float> x, View<float> out, size_t count, size_t size,
                                int per_row) {
  const size_t i = static_cast<size_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i < count) out[i] = x[i / size / static_cast<size_t>(per_row) * size + i % size];
}

// A thread for each number of `out` (n, size).
__global__ void combine_experts_kernel(View<const float> y, View<const float> shares, View<float> out,
                                       size_t count, size_t size, int per_row) {
  const size_t i = static_cast<size_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i >= count) return;
  const size_t first = i / size * static_cast<size_t>(per_row);
  float sum = 0;
  for (size_t choice = first; choice < first + static_cast<size_t>(per_row); ++choice)
    sum = fmaf(y[choice * size + i % size], shares[choice], sum);
  out[i] = sum;
}

size_t most_choices(const ModelConfig& config, int n) {
  return static_cast<size_t>(n) * static_cast<size_t>(config.num_experts_per_tok);
}

size_t tile_bytes(const ExpertTiles& tiles) {  // of what they hold; as much for each of kTileTokens choices
  return static_cast<size_t>(tiles.count) * sizeof(int32_t);
}

}  // namespace

CudaRouting::CudaRouting(Arena& arena, const ModelConfig& config, int max_tokens)
    : max_tokens_(max_tokens),
      per_row_(config.num_experts_per_tok),
      experts_(arena, most_choices(config, max_tokens) * sizeof(int32_t)),
      shares_(arena, most_choices(config, max_tokens) * sizeof(float)),
      tile_experts_(arena, tile_bytes(most_tiles(config, max_tokens))),
      tile_choices_(arena, kTileTokens * tile_bytes(most_tiles(config, max_tokens))) {
  require(config.num_experts <= kMostExperts, "a GPU mixes at most " + std::to_string(kMostExperts) +
                                                  " experts, and the model has " +
                                                  std::to_string(config.num_experts) + ": take --device cpu");
}

size_t CudaRouting::bytes(const ModelConfig& config, int max_tokens) {
  return most_choices(config, max_tokens) * (sizeof(int32_t) + sizeof(float)) +
         (1 + kTileTokens) * tile_bytes(most_tiles(config, max_tokens));
}

// The last group of each expert may be filled in part only. An expert has few tokens or many as they are on
// average: which kernel multiplies them changes no bit.
ExpertTiles CudaRouting::most_tiles(const ModelConfig& config, int n) {
  const auto choices = static_cast<int>(most_choices(config, n));
  const int at_once = tiles_at_once((choices + config.num_experts - 1) / config.num_experts);
  const int groups = choices / (at_once * kTileTokens) + min(config.num_experts, choices);
  return {nullptr, nullptr, groups * at_once, at_once, config.num_experts};
}

void CudaRouting::route(cudaStream_t stream, const ModelConfig& config, const float* scores, int n) {
  check(n <= max_tokens_, "route: the rows fit the routing");
  n_ = n;
  tiles_ = most_tiles(config, n);
  tiles_.experts = tile_experts_.as<int32_t>();
  tiles_.choices = tile_choices_.as<int32_t>();
  const auto choices = static_cast<size_t>(num_choices()), tiles = static_cast<size_t>(tiles_.count);
  const View<const float> in(scores, static_cast<size_t>(n) * static_cast<size_t>(config.num_experts));
  const View<int32_t> experts(experts_.as<int32_t>(), choices);
  const View<float> shares(shares_.as<float>(), choices);
  launch(stream, blocks_for(static_cast<size_t>(n), kRouteWarps), kRouteWarps * kWarpSize, route_kernel, in,
         experts, shares, n, config.num_experts, per_row_, config.norm_topk_prob);
  const View<int32_t> tile_experts(tile_experts_.as<int32_t>(), tiles);
  const View<int32_t> tile_choices(tile_choices_.as<int32_t>(), tiles * kTileTokens);
  launch(stream, static_cast<unsigned>(config.num_experts), kThreads, group_kernel, experts, tile_experts,
         tile_choices, num_choices(), config.num_experts, tiles_.at_once * kTileTokens, tiles_.count);
}

void CudaRouting::dispatch(cudaStream_t stream, const float* x, float* out, int size) const {
  const auto width = static_cast<size_t>(size), count = static_cast<size_t>(num_choices()) * width;
  launch(stream, blocks_for(count, kElementThreads), kElementThreads, dispatch_kernel,
         View<const float>(x, static_cast<size_t>(n_) * width), View<float>(out, count), count, width,
         per_row_);
}

void CudaRouting::combine(cudaStream_t stream, const float* y, float* out, int size) const {
  const auto width = static_cast<size_t>(size), count = static_cast<size_t>(n_) * width;
  const auto choices = static_cast<size_t>(num_choices());
  launch(stream, blocks_for(count, kElementThreads), kElementThreads, combine_experts_kernel,
         View<const float>(y, choices * width), View<const float>(shares_.as<float>(), choices),
         View<float>(out, count), count, width, per_row_);
}

}  // namespace engine::cuda
