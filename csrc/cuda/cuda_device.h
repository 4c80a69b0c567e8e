// Device for NVIDIA GPUs: checks shapes, brings a step's indices to the GPU, and launches the kernels in one
// stream.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/linear.h"
#include "cuda/runtime.h"
#include "device/device.h"

namespace engine::cuda {

class CudaDevice : public Device {
 public:
  // num_threads: of the CPU device that samples.
  CudaDevice(int num_threads, Arithmetic arithmetic);
  ~CudaDevice() override;

  std::string name() const override;

  std::unique_ptr<Buffer> alloc(size_t numbers) override;
  void copy_to_host(float* host, const float* device, size_t numbers) override;
  size_t memory_available() const override;
  size_t memory_budget(double utilization) const override;
  void reserve(size_t bytes) override { arena_.reserve(bytes); }
  size_t reserve_scratch(const ModelConfig& config, int max_tokens, int64_t max_blocks) override;
  std::unique_ptr<Weight> pack(std::span<const Tensor> sources, std::span<const float> bias) override;
  std::unique_ptr<Buffer> upload(std::span<const float> host) override;
  size_t kv_bytes_per_block(const ModelConfig& config, Format format) const override;
  std::unique_ptr<KvCache> kv_alloc(const ModelConfig& config, Format format, int32_t num_blocks) override;

  void embed(const Weight& table, std::span<const int32_t> tokens, float* out) override;
  void norm(Norm kind, float eps, const float* weight, const float* bias, const float* x, float* out, int n,
            int size) override;
  void add_norm(Norm kind, float eps, const float* weight, const float* bias, float* x, const float* delta,
                float* out, int n, int size) override;
  void linear(const Weight& weight, const float* x, float* y, int n) override;
  void rope_store_kv(const ModelConfig& config, int layer, const Batch& batch, float* qkv,
                     KvCache& cache) override;
  void attention(const ModelConfig& config, int layer, const Batch& batch, const float* qkv,
                 const KvCache& cache, float* out) override;
  void activation(Activation kind, bool gated, const float* x, float* out, int n, int size) override;
  void add(float* x, const float* delta, int n, int size) override;
  void gather_rows(const float* x, std::span<const int32_t> rows, float* out, int size) override;
  void scale(float* x, float factor, int n, int size) override;
  // On the CPU, over a copy of the logits.
  void sample(float* logits, int vocab, std::span<const SamplingRow> rows, std::span<Sampled> out) override;
  void score(float* logits, int vocab, std::span<const ScoringRow> rows,
             std::span<TokenLogprobs> out) override;

 private:
  // The attention plan of one sliding window for the current batch.
  struct WindowPlan {
    int window;
    bool current;
    DevicePlan plan;
    DeviceMemory memory;
  };

  float* logits_on_host(const float* logits, int vocab, size_t rows);
  void prepare(const ModelConfig& config, const Batch& batch, int32_t num_blocks);
  void prepare_rotation(const ModelConfig& config);
  WindowPlan& plan_of(int window);
  int enough_blocks() const;
  int max_partials(const ModelConfig& config) const;
  const DevicePlan& plan(const ModelConfig& config, int layer, const Batch& batch);
  DevicePlan upload_plan(const AttentionPlan& plan, const ModelConfig& config, DeviceMemory& memory);
  const int32_t* to_device(std::span<const int32_t> indices);

  Arithmetic arithmetic_;
  std::string name_;
  int multiprocessors_ = 0;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<Device> cpu_;
  std::vector<float> host_logits_;  // (rows, vocab)

  Arena arena_;  // of all that follows, and of what alloc(), pack() and kv_alloc() gave
  LinearScratch linear_{arena_};
  DeviceMemory indices_{arena_};  // tokens of embed(), rows of gather_rows()

  // What depends on the batch alone: made in its first layer, read in the others.
  Batch batch_;
  DeviceBatch on_device_;
  DeviceMemory batch_memory_{arena_}, cos_sin_{arena_}, inv_freq_memory_{arena_}, slopes_memory_{arena_},
      partials_{arena_};
  std::vector<float> inv_freq_, slopes_;
  float attention_factor_ = 0;
  std::vector<WindowPlan> plans_;
};

}  // namespace engine::cuda
