// The dozen operations that a transformer needs, and the memory they work on. Not tensor algebra: a variant
// is another op or a field of ModelConfig read at construction, never a boolean that travels.
//
// Activations are f32, row-major, one row per token. Every op is batch-invariant: a row of its result depends
// on that row's inputs alone, bit for bit, whatever else is in the batch. Pointers are the device's own (from
// alloc()).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/tensor.h"
#include "device/batch.h"
#include "model/config.h"

namespace engine {

// A matrix in the form that the device multiplies with. Made by Device::pack, opaque to everybody else.
class Weight {
 public:
  virtual ~Weight() = default;
  virtual size_t bytes() const = 0;
  int64_t rows = 0;  // output channels
  int64_t cols = 0;  // input channels
};

// One key/value cache for all layers: (block, layer, key/value head) → kBlockSize keys and values of head_dim
// numbers.
class KvCache {
 public:
  virtual ~KvCache() = default;
  Format format = Format::F32;  // F32, F16, BF16 or INT8
  int32_t num_blocks = 0;
};

// Which experts the rows of a step go to, and with what shares: a mixture of experts' choices,
// num_experts_per_tok to a row. They stand in an order of the Routing's own, by expert for instance:
// dispatch() puts rows into it, combine() takes them out.
class Routing {
 public:
  virtual ~Routing() = default;
};

class Buffer {  // RAII over device memory; f32
 public:
  virtual ~Buffer() = default;
  float* data = nullptr;
  size_t size = 0;  // numbers
};

// What weights are multiplied with. EXACT: f32 activations, the weights being the f32 numbers they stand for.
// ROUNDED: activations as coarse as the weights, where that is faster. For quantised weights they become
// bytes, and products are summed as integers; for BF16 ones they become bf16 on CPUs that multiply
// it fast (cpu/linear.h).
enum class Arithmetic : uint8_t { EXACT, ROUNDED };

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;

  // Memory.
  virtual std::unique_ptr<Buffer> alloc(size_t numbers) = 0;
  virtual void copy_to_host(float* host, const float* device, size_t numbers) = 0;
  virtual size_t memory_available() const = 0;  // bytes
  // What the engine takes of it when nobody says how much.
  virtual size_t memory_default() const { return memory_available() / 2; }
  // Bytes that are the engine's own where it has a device to itself, which is a GPU: a part of what is free.
  virtual size_t memory_budget(double /*utilization*/) const { return 0; }
  // All that will ever be allocated together. Called once, before anything is; a GPU takes it at once.
  virtual void reserve(size_t /*bytes*/) {}
  // Allocates what ops need beside their arguments for steps of at most max_tokens tokens, with at most
  // max_blocks entries in their block tables; returns its bytes.
  virtual size_t reserve_scratch(const ModelConfig& /*config*/, int /*max_tokens*/, int64_t /*max_blocks*/) {
    return 0;
  }
  // The sources stacked by rows (q, k and v become one weight), each in its target format; `bias` has one
  // number per row of the whole or is empty.
  virtual std::unique_ptr<Weight> pack(std::span<const Tensor> sources, std::span<const float> bias) = 0;
  virtual std::unique_ptr<Buffer> upload(std::span<const float> host) = 0;
  virtual size_t kv_bytes_per_block(const ModelConfig& config, Format format) const = 0;
  virtual std::unique_ptr<KvCache> kv_alloc(const ModelConfig& config, Format format, int32_t num_blocks) = 0;
  // Room for the choices of at most max_tokens rows, and its bytes.
  virtual std::unique_ptr<Routing> routing_alloc(const ModelConfig& config, int max_tokens) = 0;
  virtual size_t routing_bytes(const ModelConfig& config, int max_tokens) const = 0;

  // A forward pass: calls forward() with the batch, or replays what that launched for one of the same shape.
  // The batch that forward() gets may be filled up, to at most padded_rows(its rows) tokens and rows of
  // logits: more of them belong to no sequence, and what comes out for those is of no account.
  virtual void run(const ModelConfig& /*config*/, const Batch& batch,
                   const std::function<void(const Batch&)>& forward) {
    forward(batch);
  }
  virtual int padded_rows(int n) const { return n; }

  // How many rows of `row_bytes` ops are best run on together, where all could be: as many as a CPU's caches
  // hold.
  virtual int rows_at_once(size_t /*row_bytes*/) const { return INT32_MAX; }

  // Ops. `n` is the number of rows.
  // out (n, cols): rows of `table` by token id.
  virtual void embed(const Weight& table, std::span<const int32_t> tokens, float* out) = 0;
  // out (n, size): norm(x), scaled by `weight` (size) and shifted by `bias` (size, or null).
  virtual void norm(Norm kind, float eps, const float* weight, const float* bias, const float* x, float* out,
                    int n, int size) = 0;
  // x (n, size) += delta; out = norm(x). The default composes add and norm.
  virtual void add_norm(Norm kind, float eps, const float* weight, const float* bias, float* x,
                        const float* delta, float* out, int n, int size);
  // y (n, weight.rows) = x (n, weight.cols) · weightᵀ + bias.
  virtual void linear(const Weight& weight, const float* x, float* y, int n) = 0;
  // Routes each row by its scores (n, num_experts) to the num_experts_per_tok experts with the largest ones,
  // of equal ones the lower number first. Their shares are the softmax of all scores, divided by their sum
  // where norm_topk_prob. A row of NaNs goes to some experts, with shares that are NaN.
  virtual void route(const ModelConfig& config, const float* scores, int n, Routing& routing) = 0;
  // out (choices, size): the row of x (n, size) that each choice was made for.
  virtual void dispatch(const Routing& routing, const float* x, float* out, int size) = 0;
  // y (choices, rows): the matrix of each choice's expert times its row of x (choices, experts.cols). The
  // experts' matrices are one weight, stacked: expert e has its rows [e · rows, (e + 1) · rows), rows =
  // experts.rows / num_experts, and no source that it was packed from belongs to two of them.
  virtual void linear_experts(const Weight& experts, const Routing& routing, const float* x, float* y) = 0;
  // out (n, size): Σ share · y over a row's choices, the one with the largest score first, y (choices, size).
  virtual void combine(const Routing& routing, const float* y, float* out, int size) = 0;
  // Clips and rotates q and k of qkv (n, qkv_size) in place, and stores k and v in the cache of `layer`.
  virtual void rope_store_kv(const ModelConfig& config, int layer, const Batch& batch, float* qkv,
                             KvCache& cache) = 0;
  // out (n, q_size): softmax(scale · q kᵀ + bias) v over each sequence's own cached tokens, causal, windowed.
  virtual void attention(const ModelConfig& config, int layer, const Batch& batch, const float* qkv,
                         const KvCache& cache, float* out) = 0;
  // out (n, size): act(x), or act(x[:, :size]) * x[:, size:] when gated (x is then (n, 2·size)).
  virtual void activation(Activation kind, bool gated, const float* x, float* out, int n, int size) = 0;
  // x (n, size) += delta.
  virtual void add(float* x, const float* delta, int n, int size) = 0;
  // out (rows.size(), size): the named rows of x.
  virtual void gather_rows(const float* x, std::span<const int32_t> rows, float* out, int size) = 0;
  // x (n, size) *= factor.
  virtual void scale(float* x, float factor, int n, int size) = 0;
  // One token per row of logits (rows.size(), vocab). The logits are scratch afterwards.
  virtual void sample(float* logits, int vocab, std::span<const SamplingRow> rows,
                      std::span<Sampled> out) = 0;
  // Log-probabilities of one token per row of logits (rows.size(), vocab), scratch afterwards as well.
  virtual void score(float* logits, int vocab, std::span<const ScoringRow> rows,
                     std::span<TokenLogprobs> out) = 0;
};

struct DeviceOptions {
  std::string kind = "cpu";  // "cpu", "cuda", or "auto": a GPU if one can be used, else the CPU
  int num_threads = 0;       // of a CPU; 0: one per core that this process may run on
  Arithmetic arithmetic = Arithmetic::EXACT;
  bool record_graphs = true;  // of a GPU: replay steps of a shape as what the first ones launched
};

std::unique_ptr<Device> make_device(const DeviceOptions& options);

}  // namespace engine
