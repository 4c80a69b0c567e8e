// Device for NVIDIA GPUs: checks shapes, brings a step's indices to the GPU, and launches the kernels in one
// stream.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/graphs.h"
#include "cuda/linear.h"
#include "cuda/runtime.h"
#include "cuda/sampler.h"
#include "cuda/step.h"
#include "device/device.h"

namespace engine::cuda {

class CudaDevice : public Device {
 public:
  explicit CudaDevice(const DeviceOptions& options);
  ~CudaDevice() override;

  std::string name() const override;

  std::unique_ptr<Buffer> alloc(size_t numbers) override;
  void copy_to_host(float* host, const float* device, size_t numbers) override;
  size_t memory_available() const override;
  size_t memory_budget(double utilization) const override;
  void reserve(size_t bytes) override { arena_.reserve(bytes); }
  int padded_rows(int n) const override;
  void run(const ModelConfig& config, const Batch& batch,
           const std::function<void(const Batch&)>& forward) override;
  const Graphs& graphs() const { return graphs_; }
  size_t reserve_scratch(const ModelConfig& config, int max_tokens, int64_t max_blocks) override;
  std::unique_ptr<Weight> pack(std::span<const Tensor> sources, std::span<const float> bias) override;
  std::unique_ptr<Buffer> upload(std::span<const float> host) override;
  size_t kv_bytes_per_block(const ModelConfig& config, Format format) const override;
  std::unique_ptr<KvCache> kv_alloc(const ModelConfig& config, Format format, int32_t num_blocks) override;
  std::unique_ptr<Routing> routing_alloc(const ModelConfig& config, int max_tokens) override;
  size_t routing_bytes(const ModelConfig& config, int max_tokens) const override;

  void embed(const Weight& table, std::span<const int32_t> tokens, float* out) override;
  void norm(Norm kind, float eps, const float* weight, const float* bias, const float* x, float* out, int n,
            int size) override;
  void add_norm(Norm kind, float eps, const float* weight, const float* bias, float* x, const float* delta,
                float* out, int n, int size) override;
  void linear(const Weight& weight, const float* x, float* y, int n) override;
  void route(const ModelConfig& config, const float* scores, int n, Routing& routing) override;
  void dispatch(const Routing& routing, const float* x, float* out, int size) override;
  void linear_experts(const Weight& experts, const Routing& routing, const float* x, float* y) override;
  void combine(const Routing& routing, const float* y, float* out, int size) override;
  void rope_store_kv(const ModelConfig& config, int layer, const Batch& batch, float* qkv,
                     KvCache& cache) override;
  void attention(const ModelConfig& config, int layer, const Batch& batch, const float* qkv,
                 const KvCache& cache, float* out) override;
  void activation(Activation kind, bool gated, const float* x, float* out, int n, int size) override;
  void add(float* x, const float* delta, int n, int size) override;
  void gather_rows(const float* x, std::span<const int32_t> rows, float* out, int size) override;
  void scale(float* x, float factor, int n, int size) override;
  void sample(float* logits, int vocab, std::span<const SamplingRow> rows, std::span<Sampled> out) override;
  void score(float* logits, int vocab, std::span<const ScoringRow> rows,
             std::span<TokenLogprobs> out) override;

 private:
  void stage(const ModelConfig& config, const Batch& batch, bool padded);
  void bring_constants(const ModelConfig& config, int n);
  DeviceBatch prepare(const ModelConfig& config, const Batch& batch, int32_t num_blocks);
  SplitLimits split_limits(const ModelConfig& config) const;
  const int32_t* to_device(std::span<const int32_t> indices);

  Arithmetic arithmetic_;
  bool record_graphs_;
  std::string name_;
  int multiprocessors_ = 0;
  cudaStream_t stream_ = nullptr;

  Arena arena_;  // of all that follows, and of what alloc(), pack() and kv_alloc() gave
  LinearScratch linear_{arena_};
  CudaSampler sampler_{arena_};
  DeviceMemory indices_{arena_};  // tokens of embed(), rows of gather_rows()

  StagedStep step_{arena_};
  DeviceMemory cos_sin_{arena_}, inv_freq_memory_{arena_}, slopes_memory_{arena_};
  std::vector<float> inv_freq_, slopes_;  // that are there
  bool rotated_ = false;                  // cos_sin_ is that of the step
  int32_t num_blocks_ = INT32_MAX;        // of the cache that was written last
  Graphs graphs_{arena_};
};

}  // namespace engine::cuda
