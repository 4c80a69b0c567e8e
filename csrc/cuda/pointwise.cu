#include "cuda/pointwise.h"

#include "cuda/common.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256;  // of a block of elements
constexpr int kNormWarps = 4;  // of the block that normalises a row
constexpr int kNormThreads = kNormWarps * kWarpSize;

// Σ f(x[i]) over the block, each thread every kNormThreads-th number.
template <class F>
__device__ float row_sum(int size, Shared<float, kNormWarps>& partial, F f) {
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kNormThreads) sum += f(i);
  return block_sum<kNormWarps>(sum, partial);
}

// A block for each row. The variance is taken around the mean in a second pass: E[x²] - E[x]² would cancel.
template <Norm kKind, bool kAdd>
__global__ void norm_kernel(float eps, View<const float> weight, View<const float> bias, View<float> x,
                            View<const float> delta, View<float> out, int size) {
  __shared__ Shared<float, kNormWarps> sums, squares;
  const size_t start = static_cast<size_t>(blockIdx.x) * static_cast<size_t>(size);
  const View<float> row = x.from(start), normed = out.from(start);
  const int first = static_cast<int>(threadIdx.x);
  if constexpr (kAdd) {  // each thread reads back what it wrote itself
    const View<const float> more = delta.from(start);
    for (int i = first; i < size; i += kNormThreads) row[i] += more[i];
  }
  const auto count = static_cast<float>(size);
  float mean = 0;
  if constexpr (kKind == Norm::LAYER) mean = row_sum(size, sums, [&](int i) { return row[i]; }) / count;
  const float variance =
      row_sum(size, squares, [&](int i) { return (row[i] - mean) * (row[i] - mean); }) / count;
  const float factor = 1 / sqrtf(variance + eps);
  for (int i = first; i < size; i += kNormThreads) {
    const float y = (row[i] - mean) * factor * weight[i];
    normed[i] = bias ? y + bias[i] : y;
  }
}

// The functions of cpu/pointwise.inl.
struct Silu {
  __device__ static float of(float x) { return x / (1 + exp_f32(-x)); }
};

struct Gelu {
  __device__ static float erfc(float z) {
    const float t = 1 / fmaf(z, 0.3f, 1);
    float p = -0.129434f;
    p = fmaf(p, t, 0.4850961f);
    p = fmaf(p, t, -0.51122576f);
    p = fmaf(p, t, 0.5463943f);
    p = fmaf(p, t, -0.09363074f);
    p = fmaf(p, t, 0.21443607f);
    p = fmaf(p, t, 0.14848249f);
    p = fmaf(p, t, 0.17069192f);
    p = fmaf(p, t, 0.16918962f);
    return t * p * exp_f32(-(z * z));
  }
  __device__ static float of(float x) {
    const float tail = 0.5f * x * erfc(fabsf(x) * 0.70710678f);
    return x < 0 ? tail : x - tail;
  }
};

struct GeluTanh {
  __device__ static float of(float x) {
    const float cubic = fmaf(x * x, 0.044715f, 1) * x;
    return x / (1 + exp_f32(cubic * -1.5957691f));
  }
};

struct Relu {
  __device__ static float of(float x) { return x < 0 ? 0 : x; }
};

// Index of this thread's element; the grid covers `count` of them, and some more.
__device__ size_t element() {
  return static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
}

template <class Function, bool kGated>
__global__ void activation_kernel(View<const float> x, View<float> out, size_t count, int size) {
  const size_t i = element();
  if (i >= count) return;
  if constexpr (kGated) {
    const size_t width = static_cast<size_t>(size), row = i / width;
    out[i] = Function::of(x[i + row * width]) * x[i + row * width + width];
  } else {
    out[i] = Function::of(x[i]);
  }
}

__global__ void add_kernel(View<float> x, View<const float> delta, size_t count) {
  const size_t i = element();
  if (i < count) x[i] += delta[i];
}

__global__ void scale_kernel(View<float> x, float factor, size_t count) {
  const size_t i = element();
  if (i < count) x[i] *= factor;
}

__global__ void gather_kernel(View<const float> x, View<const int32_t> rows, View<float> out, size_t count,
                              int size) {
  const size_t i = element(), width = static_cast<size_t>(size);
  if (i < count) out[i] = x[static_cast<size_t>(rows[i / width]) * width + i % width];
}

size_t numbers(int n, int size) {
  return static_cast<size_t>(n) * static_cast<size_t>(size);
}

template <class Function>
void activate(cudaStream_t stream, bool gated, const float* x, float* out, int n, int size) {
  const size_t count = numbers(n, size);
  launch(stream, blocks_for(count, kThreads), kThreads,
         gated ? activation_kernel<Function, true> : activation_kernel<Function, false>,
         View<const float>(x, gated ? 2 * count : count), View<float>(out, count), count, size);
}

template <Norm kKind>
void normalise(cudaStream_t stream, float eps, const float* weight, const float* bias, float* x,
               const float* delta, float* out, int n, int size) {
  const size_t count = numbers(n, size), width = static_cast<size_t>(size);
  launch(stream, static_cast<unsigned>(n), kNormThreads,
         delta ? norm_kernel<kKind, true> : norm_kernel<kKind, false>, eps, View<const float>(weight, width),
         View<const float>(bias, width), View<float>(x, count), View<const float>(delta, count),
         View<float>(out, count), size);
}

}  // namespace

cudaError_t find_kernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, add_kernel);
}

void norm_rows(cudaStream_t stream, Norm kind, float eps, const float* weight, const float* bias, float* x,
               const float* delta, float* out, int n, int size) {
  const auto normalise_as = kind == Norm::RMS ? normalise<Norm::RMS> : normalise<Norm::LAYER>;
  normalise_as(stream, eps, weight, bias, x, delta, out, n, size);
}

void activate_rows(cudaStream_t stream, Activation kind, bool gated, const float* x, float* out, int n,
                   int size) {
  switch (kind) {
    case Activation::SILU:
      return activate<Silu>(stream, gated, x, out, n, size);
    case Activation::GELU:
      return activate<Gelu>(stream, gated, x, out, n, size);
    case Activation::GELU_TANH:
      return activate<GeluTanh>(stream, gated, x, out, n, size);
    case Activation::RELU:
      return activate<Relu>(stream, gated, x, out, n, size);
  }
}

void add_rows(cudaStream_t stream, float* x, const float* delta, int n, int size) {
  const size_t count = numbers(n, size);
  launch(stream, blocks_for(count, kThreads), kThreads, add_kernel, View<float>(x, count),
         View<const float>(delta, count), count);
}

void scale_rows(cudaStream_t stream, float* x, float factor, int n, int size) {
  const size_t count = numbers(n, size);
  launch(stream, blocks_for(count, kThreads), kThreads, scale_kernel, View<float>(x, count), factor, count);
}

void gather(cudaStream_t stream, const float* x, int num_source_rows, const int32_t* rows, int num_rows,
            float* out, int size) {
  const size_t count = numbers(num_rows, size);
  launch(stream, blocks_for(count, kThreads), kThreads, gather_kernel,
         View<const float>(x, numbers(num_source_rows, size)),
         View<const int32_t>(rows, static_cast<size_t>(num_rows)), View<float>(out, count), count, size);
}

}  // namespace engine::cuda
