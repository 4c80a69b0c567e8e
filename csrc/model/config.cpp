#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <string>

#include "base/check.h"

namespace engine {
namespace {

// Of any size, far beyond every model: keeps sums and small multiples of sizes within 32 bits.
constexpr int64_t kMost = 1 << 24;
constexpr int32_t kMostExperts = 1 << 12;  // likewise; a step's tokens times it are within 32 bits

void size(const char* name, int64_t value) {
  require(value > 0 && value <= kMost, std::string("config: ") + name + " is " + std::to_string(value) +
                                           ", expected 1 to " + std::to_string(kMost));
}

void length(const char* name, size_t found, size_t expected) {
  require(found == 0 || found == expected, std::string("config: ") + name + " has " + std::to_string(found) +
                                               " entries, expected " + std::to_string(expected));
}

void finite(const char* name, std::span<const float> values) {
  require(std::ranges::all_of(values, [](float x) { return std::isfinite(x); }),
          std::string("config: ") + name + " must be finite");
}

}  // namespace

void ModelConfig::validate() const {
  size("vocab_size", vocab_size);
  size("hidden_size", hidden_size);
  size("intermediate_size", intermediate_size);
  size("num_hidden_layers", num_hidden_layers);
  size("num_attention_heads", num_attention_heads);
  size("num_key_value_heads", num_key_value_heads);
  size("head_dim", head_dim);
  size("num_attention_heads * head_dim", int64_t{num_attention_heads} * head_dim);
  require(num_experts >= 0 && num_experts <= kMostExperts,
          "config: num_experts is " + std::to_string(num_experts) + ", expected 0 (a dense MLP) to " +
              std::to_string(kMostExperts));
  require(num_experts == 0 ? num_experts_per_tok == 0
                           : num_experts_per_tok >= 1 && num_experts_per_tok <= num_experts,
          "config: num_experts_per_tok is " + std::to_string(num_experts_per_tok) + ", with " +
              std::to_string(num_experts) + " experts");
  if (num_experts > 0) size("num_experts * mlp_in_size", int64_t{num_experts} * mlp_in_size());
  require(num_attention_heads % num_key_value_heads == 0,
          "config: num_attention_heads (" + std::to_string(num_attention_heads) +
              ") is not a multiple of num_key_value_heads (" + std::to_string(num_key_value_heads) + ")");
  require(static_cast<int64_t>(rope_inv_freq.size()) * 2 <= head_dim,
          "config: rope_inv_freq has " + std::to_string(rope_inv_freq.size()) +
              " entries, more than half of head_dim");
  length("alibi_slopes", alibi_slopes.size(), static_cast<size_t>(num_attention_heads));
  length("sliding_window", sliding_window.size(), static_cast<size_t>(num_hidden_layers));
  require(std::ranges::all_of(sliding_window, [](int32_t window) { return window >= 0; }),
          "config: sliding_window must be at least 0 (no window) in every layer");
  finite("rope_inv_freq", rope_inv_freq);
  finite("rope_attention_factor", {&rope_attention_factor, 1});
  finite("alibi_slopes", alibi_slopes);
  finite("logit_scale", {&logit_scale, 1});
  require(std::isfinite(attention_scale) && attention_scale > 0,
          "config: attention_scale must be a positive number");
  require(std::isfinite(norm_eps) && norm_eps >= 0, "config: norm_eps must be a number of at least 0");
  require(std::isfinite(clip_qkv) && clip_qkv >= 0, "config: clip_qkv must be a number of at least 0");
}

}  // namespace engine
