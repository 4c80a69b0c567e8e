// Kernels that are wrong in ways that a GPU does not tell, for tests/kernels/test_cuda_on_cpu.py.
#include <cuda_runtime.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <bit>
#include <map>
#include <string>
#include <vector>

#include "intrinsics.cuh"

namespace nb = nanobind;
using namespace engine;

namespace {

constexpr int kThreads = 64;

// Each thread hands its number to the next one: a race without the barrier.
template <bool kBarrier>
__global__ void pass_on(View<int> out) {
  __shared__ Shared<int, kThreads> numbers;
  const int i = static_cast<int>(threadIdx.x);
  numbers[i] = i;
  if (kBarrier) __syncthreads();
  out[static_cast<size_t>(i)] = numbers[(i + 1) % kThreads];
}

// Within a warp, with and without __syncwarp().
template <bool kBarrier>
__global__ void pass_on_in_warp(View<int> out) {
  __shared__ Shared<int, kThreads> numbers;
  const int i = static_cast<int>(threadIdx.x);
  numbers[i] = i;
  if (kBarrier) __syncwarp();
  out[static_cast<size_t>(i)] = numbers[i / 32 * 32 + (i + 1) % 32];
}

// Overwrites what others may not have read yet.
template <bool kBarrier>
__global__ void reuse(View<int> out) {
  __shared__ Shared<int, kThreads> numbers;
  const int i = static_cast<int>(threadIdx.x);
  numbers[i] = i;
  __syncthreads();
  out[static_cast<size_t>(i)] = numbers[kThreads - 1 - i];
  if (kBarrier) __syncthreads();
  numbers[i] = 0;
}

__global__ void unwritten(View<int> out) {
  __shared__ Shared<int, kThreads> numbers;
  out[threadIdx.x] = numbers[static_cast<int>(threadIdx.x)];
}

// All threads add to one number; then it is read.
template <bool kBefore, bool kAfter>
__global__ void add_up(View<int> out) {
  __shared__ Shared<int, 1> sum;
  if (threadIdx.x == 0) sum[0] = 0;
  if (kBefore) __syncthreads();
  sum.add(0, static_cast<int>(threadIdx.x));
  if (kAfter) __syncthreads();
  out[threadIdx.x] = sum[0];
}

__global__ void beyond(View<int> out) {
  out[threadIdx.x + 1] = 1;
}

__global__ void beyond_shared(View<int>) {
  __shared__ Shared<int, kThreads> numbers;
  numbers[static_cast<int>(threadIdx.x) - 1] = 1;
}

__global__ void misaligned(View<int> out) {
  out.store(threadIdx.x % 2, int2{1, 2});
}

__global__ void half_at_a_barrier(View<int>) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
}

__global__ void half_a_warp(View<int> out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}

__global__ void different_collectives(View<int> out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1, 1) : static_cast<int>(__ballot_sync(~0u, 1));
}

// No check finds this one: what comes out depends on the order of the threads.
__global__ void last_one_wins(View<int> out) {
  out[0] = static_cast<int>(threadIdx.x);
}

__global__ void votes(View<int> out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int odd = static_cast<int>(__ballot_sync(~0u, lane % 2));
  out[threadIdx.x] = __shfl_sync(~0u, odd + lane, 5) + __shfl_xor_sync(~0u, lane, 3);
}

using Kernel = void (*)(View<int>);
const std::map<std::string, Kernel> kKernels = {
    {"pass_on", pass_on<true>},
    {"pass_on, no barrier", pass_on<false>},
    {"pass_on_in_warp", pass_on_in_warp<true>},
    {"pass_on_in_warp, no barrier", pass_on_in_warp<false>},
    {"reuse", reuse<true>},
    {"reuse, no barrier", reuse<false>},
    {"add_up", add_up<true, true>},
    {"add_up, no barrier before", add_up<false, true>},
    {"add_up, no barrier after", add_up<true, false>},
    {"unwritten", unwritten},
    {"beyond", beyond},
    {"beyond_shared", beyond_shared},
    {"misaligned", misaligned},
    {"half_at_a_barrier", half_at_a_barrier},
    {"half_a_warp", half_a_warp},
    {"different_collectives", different_collectives},
    {"last_one_wins", last_one_wins},
    {"votes", votes},
};

std::vector<int> run(const std::string& name) {
  std::vector<int> out(kThreads, -1);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(kThreads);
  cudaLaunchKernelEx(&config, kKernels.at(name), View<int>(out.data(), out.size()));
  return out;
}

// What the instructions must compute of row-major a (16, depth) and b (depth, 8), by the PTX ISA's tables.
enum class Mma { BF16, U8_K32, U8_K16 };

__global__ void mma_kernel(Mma kind, View<const int> a, View<const int> b, View<int> c) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const int depth = kind == Mma::U8_K32 ? 32 : 16, each = kind == Mma::BF16 ? 2 : 4;
  const auto word = [&](auto number, int first) {  // `each` numbers from index first of the depth on
    uint32_t bits = 0;
    for (int i = 0; i < each; ++i) {
      const int value = number(first + i);
      bits |= (kind == Mma::BF16 ? float_to_bf16_bits(static_cast<float>(value))
                                 : static_cast<uint32_t>(value & 255))
              << (32 / each * i);
    }
    return bits;
  };
  const auto of_a = [&](int row) {
    return [&, row](int k) { return a[static_cast<size_t>(row * depth + k)]; };
  };
  const auto of_b = [&](int k) { return b[static_cast<size_t>(k * 8 + g)]; };
  const int first = each * t, second = first + 4 * each;
  uint32_t fa[4] = {word(of_a(g), first), word(of_a(g + 8), first), 0, 0}, fb[2] = {word(of_b, first), 0};
  if (second < depth) {
    fa[2] = word(of_a(g), second), fa[3] = word(of_a(g + 8), second);
    fb[1] = word(of_b, second);
  }
  float sums[4] = {};
  int totals[4] = {};
  const uint32_t pair[2] = {fa[0], fa[1]};
  if (kind == Mma::BF16) mma_bf16(sums, fa, fb);
  if (kind == Mma::U8_K32) mma_u8s8_k32(totals, fa, fb);
  if (kind == Mma::U8_K16) mma_u8s8_k16(totals, pair, fb[0]);
  for (int i = 0; i < 4; ++i)
    c[static_cast<size_t>((g + i / 2 * 8) * 8 + 2 * t + i % 2)] =
        kind == Mma::BF16 ? static_cast<int>(sums[i]) : totals[i];
}

std::vector<int> mma(const std::string& kind, const std::vector<int>& a, const std::vector<int>& b) {
  const Mma which = kind == "bf16" ? Mma::BF16 : kind == "u8 k32" ? Mma::U8_K32 : Mma::U8_K16;
  std::vector<int> c(16 * 8);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  cudaLaunchKernelEx(&config, mma_kernel, which, View<const int>(a.data(), a.size()),
                     View<const int>(b.data(), b.size()), View<int>(c.data(), c.size()));
  return c;
}

}  // namespace

// What other numbers of threads are to a CPU, another order of threads is to a GPU.
void schedule_cuda_like(int num_threads) {
  cuda_on_cpu::set_schedule(num_threads == 1 ? cuda_on_cpu::Schedule::ASCENDING
                                             : cuda_on_cpu::Schedule::DESCENDING);
}

void bind_cuda_graphs(nb::module_& m);

void bind_cuda_on_cpu(nb::module_& m) {
  bind_cuda_graphs(m);
  m.def("run_cuda", &run);
  m.def("mma", &mma);
  m.def("schedule_cuda_like", &schedule_cuda_like);
}
