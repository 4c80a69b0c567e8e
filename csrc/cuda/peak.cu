#include "cuda/peak.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "cuda/common.cuh"
#include "cuda/make_cuda_device.h"

namespace engine::cuda {
namespace {

constexpr int kTries = 10;
constexpr int kThreads = 256;
constexpr int kReadBlocks = 8, kMmaBlocks = 4;  // per multiprocessor: enough to fill it
constexpr int kChains = 8;                      // of matrix instructions that do not wait for each other

// Each thread's part of the sum of all words.
__global__ void peak_read_kernel(View<const uint32_t> data, size_t words, View<uint32_t> sums) {
  const size_t thread = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  const size_t threads = static_cast<size_t>(gridDim.x) * kThreads;
  uint32_t sum = 0;
  for (size_t i = 4 * thread; i < words; i += 4 * threads) {
    const uint4 four = data.load<uint4>(i);
    sum += four.x + four.y + four.z + four.w;
  }
  sums[thread] = sum;
}

// All numbers are one: each round adds the depth of the product to each element of each chain.
__global__ void peak_floats_kernel(int rounds, View<uint32_t> sums) {
  const uint32_t ones = pack_bf16(1, 1), a[4] = {ones, ones, ones, ones}, b[2] = {ones, ones};
  float c[kChains][4] = {};
  for (int i = 0; i < rounds; ++i)
    for (auto& chain : c) mma_bf16(chain, a, b);
  float sum = 0;
  for (const auto& chain : c) sum += chain[0] + chain[1] + chain[2] + chain[3];
  sums[static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x] = static_cast<uint32_t>(sum);
}

__global__ void peak_bytes_kernel(int rounds, View<uint32_t> sums) {
  const uint32_t ones = 0x01010101, a[4] = {ones, ones, ones, ones}, b[2] = {ones, ones};
  int c[kChains][4] = {};
  for (int i = 0; i < rounds; ++i)
    for (auto& chain : c) mma_u8s8_k32(chain, a, b);
  int sum = 0;
  for (const auto& chain : c) sum += chain[0] + chain[1] + chain[2] + chain[3];
  sums[static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x] = static_cast<uint32_t>(sum);
}

// Seconds that `run` takes at best. Its sums must come out at `expected` (modulo 2³²): nothing was left out.
template <class Run>
double best_seconds(DeviceMemory& sums, uint32_t expected, Run&& run) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kTries; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    cuda_check(cudaStreamSynchronize(nullptr), "a benchmark");
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::vector<uint32_t> host(sums.bytes() / sizeof(uint32_t));
  cuda_check(cudaMemcpyAsync(host.data(), sums.as<void>(), sums.bytes(), cudaMemcpyDeviceToHost, nullptr),
             "a copy from the GPU");
  cuda_check(cudaStreamSynchronize(nullptr), "a copy from the GPU");
  check(std::accumulate(host.begin(), host.end(), uint32_t{0}) == expected, "a benchmark does all its work");
  return best;
}

double read_rate(int multiprocessors, size_t bytes) {
  const auto blocks = static_cast<unsigned>(kReadBlocks * multiprocessors);
  const size_t threads = size_t{blocks} * kThreads, words = bytes / sizeof(uint32_t);
  Arena arena;
  arena.reserve(bytes + threads * sizeof(uint32_t) + Arena::kLost);
  const DeviceMemory data(arena, bytes);
  DeviceMemory sums(arena, threads * sizeof(uint32_t));
  cuda_check(cudaMemsetAsync(data.as<void>(), 1, bytes, nullptr), "cudaMemset");
  const double seconds = best_seconds(sums, static_cast<uint32_t>(words) * 0x01010101u, [&] {
    launch(nullptr, blocks, kThreads, peak_read_kernel, View<const uint32_t>(data.as<uint32_t>(), words),
           words, View<uint32_t>(sums.as<uint32_t>(), threads));
  });
  return static_cast<double>(bytes) / seconds;
}

// Multiplications and additions per second of a kernel whose instructions multiply (16, depth) by (depth, 8).
double mma_rate(int multiprocessors, int rounds, int depth, void (*kernel)(int, View<uint32_t>)) {
  const auto blocks = static_cast<unsigned>(kMmaBlocks * multiprocessors);
  const size_t threads = size_t{blocks} * kThreads;
  Arena arena;
  arena.reserve(threads * sizeof(uint32_t) + Arena::kAlignment);
  DeviceMemory sums(arena, threads * sizeof(uint32_t));
  const uint32_t per_thread = static_cast<uint32_t>(rounds * depth) * kChains * 4;
  const double seconds = best_seconds(sums, static_cast<uint32_t>(threads) * per_thread, [&] {
    launch(nullptr, blocks, kThreads, kernel, rounds, View<uint32_t>(sums.as<uint32_t>(), threads));
  });
  return static_cast<double>(threads / kWarpSize) * kChains * rounds * 16 * 8 * depth / seconds;
}

}  // namespace

Peaks measure_peaks(size_t bytes, int rounds) {
  const std::string problem = cuda_problem();
  require(problem.empty(), problem);
  require(bytes > 0 && bytes % sizeof(uint4) == 0, "bytes must be a multiple of 16");
  require(rounds > 0 && rounds <= 1 << 19, "rounds must be 1 to 524288, so that sums are exact");
  cudaDeviceProp properties;
  cuda_check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  const int count = properties.multiProcessorCount;
  return {read_rate(count, bytes) * 1e-9, mma_rate(count, rounds, 16, peak_floats_kernel) * 1e-9,
          mma_rate(count, rounds, 32, peak_bytes_kernel) * 1e-9};
}

}  // namespace engine::cuda
