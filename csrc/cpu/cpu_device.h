// Device for CPUs: checks shapes, divides the work among the threads of its pool, and calls the kernels of
// one ISA.
#pragma once

#include <memory>
#include <string>

#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/sample.h"
#include "cpu/thread_pool.h"
#include "device/device.h"

namespace engine {

class CpuDevice : public Device {
 public:
  // num_threads 0: one per core that this process may run on.
  CpuDevice(const Kernels& kernels, int num_threads, Arithmetic arithmetic);

  std::string name() const override;

  std::unique_ptr<Buffer> alloc(size_t numbers) override;
  void copy_to_host(float* host, const float* device, size_t numbers) override;
  size_t memory_available() const override;
  int rows_at_once(size_t row_bytes) const override;
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
  template <class F>
  void for_rows(int n, int size, F&& rows);

  const Kernels& kernels_;
  Arithmetic arithmetic_;
  ThreadPool pool_;
  Arena arena_;
  RoundedRows rounded_;  // what linear() multiplies
  Attention attention_;
  Sampler sampler_;
};

}  // namespace engine
