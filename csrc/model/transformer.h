// The forward pass, once, for every architecture and device.
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "device/device.h"
#include "model/config.h"

namespace engine {

// Where a tensor lies: what Python read from a safetensors or GGUF header.
struct TensorInfo {
  std::string name;  // the checkpoint's
  Format format;
  std::vector<int64_t> shape;  // (rows, cols) or (size)
  std::string file;
  uint64_t offset;  // bytes from the start of the file
};

// Role in the model ("embed", "layers.3.qkv", …; see weights.h) → the tensors that make it up, stacked by
// rows.
using TensorIndex = std::unordered_map<std::string, std::vector<TensorInfo>>;

// How far loading is; written by the loader, read by whoever shows it.
struct Loading {
  std::atomic<int64_t> bytes_done = 0, bytes_total = 0;
};

struct LayerWeights;
struct Weights;

class Transformer {
 public:
  // max_tokens and max_logits bound a batch; they size the activations.
  Transformer(const ModelConfig& config, Weights weights, Device& device, int max_tokens, int max_logits);
  ~Transformer();

  // What the constructor allocates beside the weights.
  static size_t activation_bytes(const ModelConfig& config, const Device& device, int max_tokens,
                                 int max_logits);

  void kv_alloc(Format format, int32_t num_blocks);
  // Runs the batch; returns logits (batch.num_logits(), vocab_size), valid until the next call.
  float* forward(const Batch& batch);
  // The logits (rows.size(), vocab_size) of other tokens of the last batch, at most max_logits of them.
  float* logits(std::span<const int32_t> rows);
  // Likewise their states behind the final norm, (rows.size(), hidden_size).
  float* hidden(std::span<const int32_t> rows);
  int max_logits() const;

 private:
  struct Activations;

  void layers(const Batch& batch);
  void mlp(const LayerWeights& layer, int n);
  // out (n, hidden_size) = the MLP, or its mixture of experts, of x (n, hidden_size).
  void dense_mlp(const LayerWeights& layer, const float* x, float* out, int n);
  void experts(const LayerWeights& layer, const float* x, float* out, int n);

  ModelConfig config_;
  Device& device_;
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Activations> activations_;
};

}  // namespace engine
