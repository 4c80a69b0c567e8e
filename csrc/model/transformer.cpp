#include "model/transformer.h"

#include <algorithm>

#include "base/check.h"
#include "model/weights.h"

namespace engine {

// Scratch of one step, sized once for the largest batch.
struct Transformer::Activations {
  Activations(const ModelConfig& c, Device& d, int max_tokens, int max_logits)
      : max_tokens(max_tokens),
        max_logits(max_logits),
        token_rows(d.padded_rows(max_tokens)),
        logit_rows(d.padded_rows(max_logits)),
        mlp_rows(token_rows * c.mlps_per_tok()),
        residual(d.alloc(size(token_rows, c.hidden_size))),
        normed(d.alloc(size(token_rows, c.hidden_size))),
        delta(d.alloc(size(token_rows, c.hidden_size))),
        qkv(d.alloc(size(token_rows, c.qkv_size()))),
        attended(d.alloc(size(token_rows, c.q_size()))),
        mlp_in(d.alloc(size(mlp_rows, c.mlp_in_size()))),
        mlp_mid(d.alloc(size(mlp_rows, c.intermediate_size))),
        last(d.alloc(size(logit_rows, c.hidden_size))),
        logits(d.alloc(size(logit_rows, c.vocab_size))) {
    if (c.num_experts == 0) return;
    router_scores = d.alloc(size(token_rows, c.num_experts));
    chosen = d.alloc(size(mlp_rows, c.hidden_size));
    routing = d.routing_alloc(c, token_rows);
  }

  static size_t size(int rows, int cols) { return static_cast<size_t>(rows) * static_cast<size_t>(cols); }

  int max_tokens, max_logits;
  int token_rows, logit_rows;        // as many with what fills up a batch
  int mlp_rows;                      // a token's for each of its experts
  std::unique_ptr<Buffer> residual;  // (token_rows, hidden_size)
  std::unique_ptr<Buffer> normed;    // (token_rows, hidden_size)
  std::unique_ptr<Buffer> delta;     // (token_rows, hidden_size)
  std::unique_ptr<Buffer> qkv;       // (token_rows, qkv_size)
  std::unique_ptr<Buffer> attended;  // (token_rows, q_size)
  std::unique_ptr<Buffer> mlp_in;    // (mlp_rows, mlp_in_size)
  std::unique_ptr<Buffer> mlp_mid;   // (mlp_rows, intermediate_size)
  std::unique_ptr<Buffer> last;      // (logit_rows, hidden_size)
  std::unique_ptr<Buffer> logits;    // (logit_rows, vocab_size)
  // Of a mixture of experts.
  std::unique_ptr<Buffer> router_scores;  // (token_rows, num_experts)
  std::unique_ptr<Buffer> chosen;         // (mlp_rows, hidden_size): what experts get, then what they give
  std::unique_ptr<Routing> routing;
};

Transformer::Transformer(const ModelConfig& config, Weights weights, Device& device, int max_tokens,
                         int max_logits)
    : config_(config),
      device_(device),
      weights_(std::make_unique<Weights>(std::move(weights))),
      activations_(std::make_unique<Activations>(config, device, max_tokens, max_logits)) {}

Transformer::~Transformer() = default;

size_t Transformer::activation_bytes(const ModelConfig& c, const Device& device, int max_tokens,
                                     int max_logits) {
  const int token_rows = device.padded_rows(max_tokens), logit_rows = device.padded_rows(max_logits);
  const int mlp_rows = token_rows * c.mlps_per_tok();
  size_t numbers = Activations::size(token_rows, 3 * c.hidden_size + c.qkv_size() + c.q_size()) +
                   Activations::size(mlp_rows, c.mlp_in_size() + c.intermediate_size) +
                   Activations::size(logit_rows, c.hidden_size) + Activations::size(logit_rows, c.vocab_size);
  if (c.num_experts == 0) return sizeof(float) * numbers;
  numbers += Activations::size(token_rows, c.num_experts) + Activations::size(mlp_rows, c.hidden_size);
  return sizeof(float) * numbers + device.routing_bytes(c, token_rows);
}

void Transformer::kv_alloc(Format format, int32_t num_blocks) {
  cache_ = device_.kv_alloc(config_, format, num_blocks);
}

float* Transformer::forward(const Batch& batch) {
  check(batch.num_tokens() > 0 && batch.num_tokens() <= activations_->max_tokens,
        "batch fits the activations");
  device_.run(config_, batch, [this](const Batch& b) {
    layers(b);
    logits(b.logit_rows);
  });
  return activations_->logits->data;
}

void Transformer::layers(const Batch& batch) {
  const ModelConfig& c = config_;
  Activations& a = *activations_;
  const int n = batch.num_tokens();

  float* x = a.residual->data;
  float* delta = nullptr;  // what the last block adds to the residual; added by the norm that reads the sum
  auto norm = [&](const NormWeights& w) {
    const float* bias = w.bias ? w.bias->data : nullptr;
    if (delta)
      device_.add_norm(c.norm, c.norm_eps, w.weight->data, bias, x, delta, a.normed->data, n, c.hidden_size);
    else
      device_.norm(c.norm, c.norm_eps, w.weight->data, bias, x, a.normed->data, n, c.hidden_size);
  };

  device_.embed(*weights_->embed_table, batch.tokens, x);
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    const LayerWeights& layer = weights_->layers[static_cast<size_t>(i)];
    norm(layer.attn_norm);
    device_.linear(*layer.qkv, a.normed->data, a.qkv->data, n);
    device_.rope_store_kv(c, i, batch, a.qkv->data, *cache_);
    device_.attention(c, i, batch, a.qkv->data, *cache_, a.attended->data);
    device_.linear(*layer.attn_out, a.attended->data, a.delta->data, n);
    delta = a.delta->data;
    norm(layer.mlp_norm);
    mlp(layer, n);
  }
  device_.add(x, delta, n, c.hidden_size);
}

// delta = mlp(normed), a few rows at a time: the widest activations of all would leave the caches. An expert
// gets a part of the rows only.
void Transformer::mlp(const LayerWeights& layer, int n) {
  const ModelConfig& c = config_;
  const auto row_bytes = sizeof(float) * static_cast<size_t>(c.mlp_in_size() + c.intermediate_size);
  int64_t most = device_.rows_at_once(row_bytes);
  if (c.num_experts > 0) most = most * c.num_experts / c.num_experts_per_tok;
  const auto at_once = static_cast<int>(std::min<int64_t>(most, n));
  for (int row = 0; row < n; row += at_once) {
    const int rows = std::min(at_once, n - row);
    const size_t first = Activations::size(row, c.hidden_size);
    const float* x = activations_->normed->data + first;
    float* out = activations_->delta->data + first;
    c.num_experts > 0 ? experts(layer, x, out, rows) : dense_mlp(layer, x, out, rows);
  }
}

void Transformer::dense_mlp(const LayerWeights& layer, const float* x, float* out, int n) {
  const ModelConfig& c = config_;
  Activations& a = *activations_;
  device_.linear(*layer.mlp_in, x, a.mlp_in->data, n);
  device_.activation(c.activation, c.gated_mlp, a.mlp_in->data, a.mlp_mid->data, n, c.intermediate_size);
  device_.linear(*layer.mlp_out, a.mlp_mid->data, out, n);
}

void Transformer::experts(const LayerWeights& layer, const float* x, float* out, int n) {
  const ModelConfig& c = config_;
  Activations& a = *activations_;
  device_.linear(*layer.router, x, a.router_scores->data, n);
  device_.route(c, a.router_scores->data, n, *a.routing);
  device_.dispatch(*a.routing, x, a.chosen->data, c.hidden_size);
  device_.linear_experts(*layer.mlp_in, *a.routing, a.chosen->data, a.mlp_in->data);
  device_.activation(c.activation, c.gated_mlp, a.mlp_in->data, a.mlp_mid->data, n * c.num_experts_per_tok,
                     c.intermediate_size);
  device_.linear_experts(*layer.mlp_out, *a.routing, a.mlp_mid->data, a.chosen->data);
  device_.combine(*a.routing, a.chosen->data, out, c.hidden_size);
}

int Transformer::max_logits() const {
  return activations_->max_logits;
}

// Only the rows that are read pass the final norm and the head, by far the widest multiply.
float* Transformer::hidden(std::span<const int32_t> rows) {
  const ModelConfig& c = config_;
  Activations& a = *activations_;
  const auto n = static_cast<int>(rows.size());
  check(n <= a.logit_rows, "the rows fit the activations");
  const NormWeights& w = weights_->final_norm;
  float* last = a.last->data;
  device_.gather_rows(a.residual->data, rows, last, c.hidden_size);
  device_.norm(c.norm, c.norm_eps, w.weight->data, w.bias ? w.bias->data : nullptr, last, a.normed->data, n,
               c.hidden_size);
  return a.normed->data;
}

float* Transformer::logits(std::span<const int32_t> rows) {
  const ModelConfig& c = config_;
  Activations& a = *activations_;
  const auto n = static_cast<int>(rows.size());
  if (n == 0) return a.logits->data;
  hidden(rows);
  device_.linear(weights_->lm_head(), a.normed->data, a.logits->data, n);
  if (c.logit_scale != 1) device_.scale(a.logits->data, c.logit_scale, n, c.vocab_size);
  return a.logits->data;
}

}  // namespace engine
