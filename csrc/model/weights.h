// The roles that a checkpoint's tensors play, and the checked, packed result.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "device/device.h"
#include "model/config.h"
#include "model/transformer.h"

namespace engine {

struct NormWeights {
  std::unique_ptr<Buffer> weight;  // (hidden_size)
  std::unique_ptr<Buffer> bias;    // (hidden_size) or null
};

struct LayerWeights {
  NormWeights attn_norm;             // roles layers.i.attn_norm, .attn_norm.bias
  std::unique_ptr<Weight> qkv;       // (qkv_size, hidden_size); layers.i.qkv, .qkv.bias: q, k and v stacked
  std::unique_ptr<Weight> attn_out;  // (hidden_size, q_size)
  NormWeights mlp_norm;
  std::unique_ptr<Weight> router;  // (num_experts, hidden_size), plain floats; null: a dense MLP
  // Gate and up stacked: (2·intermediate_size or intermediate_size, hidden_size); those of all experts, one
  // expert's after the other's.
  std::unique_ptr<Weight> mlp_in;
  std::unique_ptr<Weight> mlp_out;  // (hidden_size, intermediate_size), likewise
};

struct Weights {
  std::unique_ptr<Weight> embed_table;  // (vocab_size, hidden_size); role embed
  std::unique_ptr<Weight> head;         // (vocab_size, hidden_size); role lm_head; null: tied to embed
  std::vector<LayerWeights> layers;     // (num_hidden_layers)
  NormWeights final_norm;

  const Weight& lm_head() const { return head ? *head : *embed_table; }
  size_t bytes() const;
};

// Bytes of the weights once load_weights() has converted them, but for the padding of panels. Throws
// InputError for a weight_format that is none.
int64_t loaded_bytes(const TensorIndex& tensors, const std::string& weight_format);

// Maps the files, checks every tensor's name, format and shape against the config, and packs it for the
// device. weight_format: "" keeps each tensor's own format; F32, F16, BF16, INT8 or INT4 (Q4_1,
// but INT8 for embeddings and head) converts the plain-float ones but for routers. Throws InputError naming
// the tensor, what was expected and what was found.
Weights load_weights(const ModelConfig& config, const TensorIndex& tensors, const std::string& weight_format,
                     Device& device, Loading& loading);

}  // namespace engine
