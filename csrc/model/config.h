// What a transformer is, as data. Python fills it from a checkpoint's own configuration
// (server/…/architectures/); nothing in C++ knows a model by name.
#pragma once

#include <cstdint>
#include <vector>

namespace engine {

enum class Norm : uint8_t { RMS, LAYER };
enum class Activation : uint8_t { SILU, GELU, GELU_TANH, RELU };

struct ModelConfig {
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t num_hidden_layers = 0;
  int32_t num_attention_heads = 0;
  int32_t num_key_value_heads = 0;
  int32_t head_dim = 0;

  Norm norm = Norm::RMS;
  float norm_eps = 1e-5f;
  Activation activation = Activation::SILU;
  bool gated_mlp = true;  // act(gate(x)) * up(x) rather than act(up(x))

  int32_t num_experts = 0;  // each an MLP of intermediate_size, chosen among by a router; 0: one MLP for all
  int32_t num_experts_per_tok = 0;  // that a token's MLP is made of
  bool norm_topk_prob = true;  // their shares add up to 1, rather than being the softmax over all experts

  float attention_scale = 0;  // multiplies q·k
  float clip_qkv = 0;         // > 0: q, k and v are clamped to ±clip_qkv
  float logit_scale = 1;
  std::vector<float> rope_inv_freq;  // (rotary_dim / 2), scaling applied; empty: no rotary embedding
  bool rope_interleaved = false;    // rotate pairs (2i, 2i+1) as GGUF's Llama does, not (i, i + rotary_dim/2)
  float rope_attention_factor = 1;  // multiplies cos and sin (YaRN)
  std::vector<float> alibi_slopes;  // (num_attention_heads); empty: no ALiBi
  std::vector<int32_t> sliding_window;  // (num_hidden_layers): keys seen, the token itself included; 0: all

  int32_t q_size() const { return num_attention_heads * head_dim; }
  int32_t kv_size() const { return num_key_value_heads * head_dim; }
  int32_t qkv_size() const { return q_size() + 2 * kv_size(); }
  int32_t mlps_per_tok() const { return num_experts > 0 ? num_experts_per_tok : 1; }
  int32_t mlp_in_size() const { return gated_mlp ? 2 * intermediate_size : intermediate_size; }

  // Throws InputError naming the first field that contradicts another.
  void validate() const;
};

}  // namespace engine
