#include "model/config.h"

#include <cmath>
#include <string>

#include "base/check.h"

namespace engine {
namespace {

void positive(const char* name, int64_t value) {
  require(value > 0,
          std::string("config: ") + name + " is " + std::to_string(value) + ", expected at least 1");
}

void length(const char* name, size_t found, size_t expected) {
  require(found == 0 || found == expected, std::string("config: ") + name + " has " + std::to_string(found) +
                                               " entries, expected " + std::to_string(expected));
}

}  // namespace

void ModelConfig::validate() const {
  positive("vocab_size", vocab_size);
  positive("hidden_size", hidden_size);
  positive("intermediate_size", intermediate_size);
  positive("num_hidden_layers", num_hidden_layers);
  positive("num_attention_heads", num_attention_heads);
  positive("num_key_value_heads", num_key_value_heads);
  positive("head_dim", head_dim);
  require(num_attention_heads % num_key_value_heads == 0,
          "config: num_attention_heads (" + std::to_string(num_attention_heads) +
              ") is not a multiple of num_key_value_heads (" + std::to_string(num_key_value_heads) + ")");
  require(static_cast<int64_t>(rope_inv_freq.size()) * 2 <= head_dim,
          "config: rope_inv_freq has " + std::to_string(rope_inv_freq.size()) +
              " entries, more than half of head_dim");
  length("alibi_slopes", alibi_slopes.size(), static_cast<size_t>(num_attention_heads));
  length("sliding_window", sliding_window.size(), static_cast<size_t>(num_hidden_layers));
  require(std::isfinite(attention_scale) && attention_scale > 0,
          "config: attention_scale must be a positive number");
  require(std::isfinite(norm_eps) && norm_eps >= 0, "config: norm_eps must be a number of at least 0");
  require(std::isfinite(clip_qkv) && clip_qkv >= 0, "config: clip_qkv must be a number of at least 0");
}

}  // namespace engine
