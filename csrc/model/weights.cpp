#include "model/weights.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/check.h"
#include "model/checkpoint.h"

namespace engine {
namespace {

std::string shape_text(int64_t rows, int64_t cols) {
  return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")";
}

std::string names(const std::vector<Tensor>& tensors) {
  std::string text;
  for (const Tensor& t : tensors) text += (text.empty() ? "" : " + ") + t.name;
  return text;
}

bool is_router(const std::string& role) {
  return role.ends_with(".router");
}

// What a tensor becomes while it is loaded.
class Conversion {
 public:
  explicit Conversion(const std::string& weight_format) {
    if (weight_format.empty()) return;
    const std::pair<const char*, Format> targets[] = {{"F32", Format::F32},
                                                      {"F16", Format::F16},
                                                      {"BF16", Format::BF16},
                                                      {"INT8", Format::INT8},
                                                      {"INT4", Format::Q4_1}};
    for (const auto& [name, format] : targets)
      if (weight_format == name) target_ = format;
    require(target_.has_value(),
            "weight_format is \"" + weight_format + "\", expected \"\", F32, F16, BF16, INT8 or INT4");
  }

  // Plain floats alone are converted, and only where their columns fill whole blocks. Four bits cost the
  // embeddings and the head most, so these get bytes (benchmarks/LOG.md). Routers stay as they are: rounded
  // ones would choose other experts.
  Format of(const std::string& role, Format format, int64_t cols) const {
    if (!target_ || !is_plain(format) || is_router(role) || cols % block_size(*target_) != 0) return format;
    const bool vocabulary = role == "embed" || role == "lm_head";
    return *target_ == Format::Q4_1 && vocabulary ? Format::INT8 : *target_;
  }

 private:
  std::optional<Format> target_;
};

class Loader {
 public:
  Loader(const TensorIndex& index, const std::string& weight_format, Device& device, Loading& loading)
      : checkpoint_(index), conversion_(weight_format), device_(device), loading_(loading) {
    loading_.bytes_total = stored_bytes(index);
  }

  std::unique_ptr<Weight> weight(const std::string& role, int64_t rows, int64_t cols) {
    std::vector<Tensor> sources = checkpoint_.tensors(role);
    require(!sources.empty(), "the checkpoint has no tensor for " + role);
    int64_t found_rows = 0;
    for (const Tensor& t : sources) {
      found_rows += t.rows;
      require(t.cols == cols, "tensor " + t.name + " has shape " + shape_text(t.rows, t.cols) +
                                  ", expected " + std::to_string(cols) + " columns by the config");
    }
    require(found_rows == rows, "tensor " + names(sources) + " has shape " + shape_text(found_rows, cols) +
                                    ", expected " + shape_text(rows, cols) + " by the config");
    const std::vector<float> bias = optional_vector(role + ".bias", rows);
    for (Tensor& t : sources) t.target = conversion_.of(role, t.format, t.cols);
    auto packed = device_.pack(sources, bias);
    for (const Tensor& t : sources) loading_.bytes_done += bytes(t);
    return packed;
  }

  // Multiplied exactly, for which experts are chosen depends on it.
  std::unique_ptr<Weight> router(const std::string& role, int64_t rows, int64_t cols) {
    for (const Tensor& t : checkpoint_.tensors(role))
      require(is_plain(t.format), "tensor " + t.name + " is " + format_name(t.format) +
                                      ", expected F32, F16 or BF16: a router is not quantised");
    return weight(role, rows, cols);
  }

  // `num` matrices of equally many rows, each from sources of its own.
  std::unique_ptr<Weight> experts(const std::string& role, int64_t num, int64_t rows, int64_t cols) {
    int64_t row = 0;
    for (const Tensor& t : checkpoint_.tensors(role)) {
      require(row % rows + t.rows <= rows, "tensor " + t.name + " has shape " + shape_text(t.rows, t.cols) +
                                               ", expected a part of one expert's " + std::to_string(rows) +
                                               " rows");
      row += t.rows;
    }
    return weight(role, num * rows, cols);
  }

  std::unique_ptr<Weight> optional_weight(const std::string& role, int64_t rows, int64_t cols) {
    return checkpoint_.tensors(role).empty() ? nullptr : weight(role, rows, cols);
  }

  NormWeights norm(const std::string& role, int64_t size) {
    const std::vector<float> scale = optional_vector(role, size);
    require(!scale.empty(), "the checkpoint has no tensor for " + role);
    const std::vector<float> bias = optional_vector(role + ".bias", size);
    return {device_.upload(scale), bias.empty() ? nullptr : device_.upload(bias)};
  }

 private:
  static int64_t bytes(const Tensor& t) { return t.rows * static_cast<int64_t>(row_bytes(t.format, t.cols)); }

  // Vectors stacked end to end, as f32; empty when the checkpoint has none.
  std::vector<float> optional_vector(const std::string& role, int64_t size) {
    std::vector<float> values;
    const std::vector<Tensor> sources = checkpoint_.tensors(role);
    for (const Tensor& t : sources) {
      const size_t at = values.size();
      require(t.rows == 1,
              "tensor " + t.name + " has shape " + shape_text(t.rows, t.cols) + ", expected a vector");
      values.resize(at + static_cast<size_t>(t.cols));
      dequantize_row(t.format, t.data, values.data() + at, t.cols);
      loading_.bytes_done += bytes(t);
    }
    require(values.empty() || static_cast<int64_t>(values.size()) == size,
            "tensor " + names(sources) + " has " + std::to_string(values.size()) + " numbers, expected " +
                std::to_string(size) + " by the config");
    return values;
  }

  Checkpoint checkpoint_;
  Conversion conversion_;
  Device& device_;
  Loading& loading_;
};

LayerWeights load_layer(const ModelConfig& c, const std::string& prefix, Loader& load) {
  LayerWeights layer;
  layer.attn_norm = load.norm(prefix + "attn_norm", c.hidden_size);
  layer.qkv = load.weight(prefix + "qkv", c.qkv_size(), c.hidden_size);
  layer.attn_out = load.weight(prefix + "attn_out", c.hidden_size, c.q_size());
  layer.mlp_norm = load.norm(prefix + "mlp_norm", c.hidden_size);
  if (c.num_experts == 0) {
    layer.mlp_in = load.weight(prefix + "mlp_in", c.mlp_in_size(), c.hidden_size);
    layer.mlp_out = load.weight(prefix + "mlp_out", c.hidden_size, c.intermediate_size);
  } else {
    layer.router = load.router(prefix + "router", c.num_experts, c.hidden_size);
    layer.mlp_in = load.experts(prefix + "mlp_in", c.num_experts, c.mlp_in_size(), c.hidden_size);
    layer.mlp_out = load.experts(prefix + "mlp_out", c.num_experts, c.hidden_size, c.intermediate_size);
  }
  return layer;
}

}  // namespace

size_t Weights::bytes() const {
  size_t total = embed_table->bytes() + (head ? head->bytes() : 0);
  for (const LayerWeights& l : layers)
    for (const auto* w : {&l.qkv, &l.attn_out, &l.router, &l.mlp_in, &l.mlp_out})
      total += *w ? (*w)->bytes() : 0;
  return total;
}

int64_t loaded_bytes(const TensorIndex& tensors, const std::string& weight_format) {
  const Conversion conversion(weight_format);
  TensorIndex converted = tensors;
  for (auto& [role, infos] : converted)
    for (TensorInfo& info : infos)
      if (info.shape.size() == 2) info.format = conversion.of(role, info.format, info.shape.back());
  return stored_bytes(converted);
}

Weights load_weights(const ModelConfig& config, const TensorIndex& tensors, const std::string& weight_format,
                     Device& device, Loading& loading) {
  config.validate();
  Loader load(tensors, weight_format, device, loading);
  Weights weights;
  weights.embed_table = load.weight("embed", config.vocab_size, config.hidden_size);
  for (int i = 0; i < config.num_hidden_layers; ++i)
    weights.layers.push_back(load_layer(config, "layers." + std::to_string(i) + ".", load));
  weights.final_norm = load.norm("final_norm", config.hidden_size);
  weights.head = load.optional_weight("lm_head", config.vocab_size, config.hidden_size);
  return weights;
}

}  // namespace engine
