#include "cuda/cuda_device.h"

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "cuda/experts.h"
#include "cuda/make_cuda_device.h"
#include "cuda/pointwise.h"

namespace engine::cuda {
namespace {

constexpr int kBlocksPerProcessor = 2;  // of attention, below which partitions are worked on apart
constexpr int kPartialsPerBlock = 64;   // the most of them, for each of those blocks
constexpr size_t kMostGraphRows =
    256;  // of a step that is replayed; larger ones have kernels that take longer

class CudaBuffer : public Buffer {
 public:
  CudaBuffer(Arena& arena, size_t numbers) : memory_(arena, numbers * sizeof(float)) {
    data = memory_.as<float>();
    size = numbers;
  }

 private:
  DeviceMemory memory_;
};

// Every sequence has one token, and samples the next one.
bool decodes(const Batch& batch) {
  const size_t n = batch.tokens.size();
  return batch.sequences.size() == n && batch.logit_rows.size() == n && n <= kMostGraphRows;
}

}  // namespace

CudaDevice::CudaDevice(const DeviceOptions& options)
    : arithmetic_(options.arithmetic), record_graphs_(options.record_graphs) {
  const std::string problem = cuda_problem();
  require(problem.empty(), problem);
  cuda_check(cudaSetDevice(0), "cudaSetDevice");
  cudaDeviceProp properties;
  cuda_check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  name_ = std::string("cuda (") + properties.name + ", " + std::to_string(properties.totalGlobalMem >> 20) +
          " MiB)";
  multiprocessors_ = properties.multiProcessorCount;
  cuda_check(cudaStreamCreate(&stream_), "cudaStreamCreate");
}

CudaDevice::~CudaDevice() {
  cudaStreamDestroy(stream_);
}

std::string CudaDevice::name() const {
  return name_;
}

std::unique_ptr<Buffer> CudaDevice::alloc(size_t numbers) {
  return std::make_unique<CudaBuffer>(arena_, numbers);
}

void CudaDevice::copy_to_host(float* host, const float* device, size_t numbers) {
  cuda_check(cudaMemcpyAsync(host, device, numbers * sizeof(float), cudaMemcpyDeviceToHost, stream_),
             "a copy from the GPU");
  cuda_check(cudaStreamSynchronize(stream_), "the work before a copy from the GPU");
}

size_t CudaDevice::memory_available() const {
  if (arena_.reserved()) return arena_.available();
  size_t free = 0, total = 0;
  cuda_check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return free;
}

size_t CudaDevice::memory_budget(double utilization) const {
  return static_cast<size_t>(static_cast<double>(memory_available()) * utilization);
}

size_t CudaDevice::reserve_scratch(const ModelConfig& c, int max_tokens, int64_t max_blocks) {
  const size_t before = arena_.available();
  const int rows = padded_rows(max_tokens);
  const int tiles = tiles_of(rows), dense_mlp = c.num_experts > 0 ? 0 : c.intermediate_size;
  size_t places = LinearScratch::places(tiles, std::max({c.hidden_size, c.q_size(), dense_mlp}));
  if (c.num_experts > 0)
    places = std::max(places, LinearScratch::places(CudaRouting::most_tiles(c, rows).count,
                                                    std::max(c.hidden_size, c.intermediate_size)));
  linear_.reserve(places);
  indices_.reserve(static_cast<size_t>(rows) * sizeof(int32_t));
  step_.reserve(c, rows, max_blocks, split_limits(c));
  sampler_.reserve(c.vocab_size);
  bring_constants(c, rows);
  return before - arena_.available() + Arena::kLost;
}

std::unique_ptr<Weight> CudaDevice::pack(std::span<const Tensor> sources, std::span<const float> bias) {
  return pack_for_cuda(arena_, sources, bias, arithmetic_, stream_);
}

std::unique_ptr<Buffer> CudaDevice::upload(std::span<const float> host) {
  auto buffer = alloc(host.size());
  copy_to_device(buffer->data, host.data(), host.size_bytes(), stream_);
  return buffer;
}

size_t CudaDevice::kv_bytes_per_block(const ModelConfig& config, Format format) const {
  return CudaKvCache::head_bytes(config, format) * static_cast<size_t>(config.num_key_value_heads) *
         static_cast<size_t>(config.num_hidden_layers);
}

std::unique_ptr<KvCache> CudaDevice::kv_alloc(const ModelConfig& config, Format format, int32_t num_blocks) {
  return std::make_unique<CudaKvCache>(arena_, config, format, num_blocks);
}

std::unique_ptr<Routing> CudaDevice::routing_alloc(const ModelConfig& config, int max_tokens) {
  return std::make_unique<CudaRouting>(arena_, config, max_tokens);
}

size_t CudaDevice::routing_bytes(const ModelConfig& config, int max_tokens) const {
  return CudaRouting::bytes(config, max_tokens);
}

const int32_t* CudaDevice::to_device(std::span<const int32_t> indices) {
  if (const int32_t* staged = step_.find(indices)) return staged;
  indices_.reserve(indices.size_bytes());
  copy_to_device(indices_.as<int32_t>(), indices.data(), indices.size_bytes(), stream_);
  return indices_.as<int32_t>();
}

int CudaDevice::padded_rows(int n) const {
  const auto rows = static_cast<size_t>(n);
  return rows <= kMostGraphRows ? static_cast<int>(std::bit_ceil(rows)) : n;
}

// A step of a decode is launched as a graph: it takes a CPU longer to launch its kernels than a GPU to run
// them.
void CudaDevice::run(const ModelConfig& config, const Batch& batch,
                     const std::function<void(const Batch&)>& forward) {
  for (const int32_t token : batch.tokens)
    check(token >= 0 && token < config.vocab_size, "token id out of range");
  const bool graph = record_graphs_ && decodes(batch);
  stage(config, batch, graph);
  check(step_.largest_block() < num_blocks_, "batch: block tables name blocks of the cache");
  const auto launch = [&] {
    rotated_ = false;
    forward(step_.batch());
  };
  if (graph)
    graphs_.run(stream_, step_.shape(), launch);
  else
    launch();
}

void CudaDevice::stage(const ModelConfig& config, const Batch& batch, bool padded) {
  step_.bring(stream_, config, batch, split_limits(config), padded);
  bring_constants(config, step_.batch().num_tokens());
  rotated_ = false;
}

// What depends on the model alone, and room for its rotation of n tokens.
void CudaDevice::bring_constants(const ModelConfig& config, int n) {
  const auto bring = [this](const std::vector<float>& values, std::vector<float>& there,
                            DeviceMemory& memory) {
    if (values == there) return;
    memory.reserve(values.size() * sizeof(float));
    copy_to_device(memory.as<float>(), values.data(), values.size() * sizeof(float), stream_);
    there = values;
  };
  bring(config.rope_inv_freq, inv_freq_, inv_freq_memory_);
  bring(config.alibi_slopes, slopes_, slopes_memory_);
  cos_sin_.reserve(2 * static_cast<size_t>(n) * inv_freq_.size() * sizeof(float));
}

void CudaDevice::embed(const Weight& table, std::span<const int32_t> tokens, float* out) {
  for (const int32_t token : tokens) check(token >= 0 && token < table.rows, "token id out of range");
  embed_rows(stream_, static_cast<const CudaWeight&>(table), to_device(tokens),
             static_cast<int>(tokens.size()), out);
}

void CudaDevice::norm(Norm kind, float eps, const float* weight, const float* bias, const float* x,
                      float* out, int n, int size) {
  check(n >= 0 && size > 0, "an op has rows of at least one number");
  norm_rows(stream_, kind, eps, weight, bias, const_cast<float*>(x), nullptr, out, n, size);
}

void CudaDevice::add_norm(Norm kind, float eps, const float* weight, const float* bias, float* x,
                          const float* delta, float* out, int n, int size) {
  check(n >= 0 && size > 0, "an op has rows of at least one number");
  norm_rows(stream_, kind, eps, weight, bias, x, delta, out, n, size);
}

void CudaDevice::linear(const Weight& weight, const float* x, float* y, int n) {
  multiply(stream_, static_cast<const CudaWeight&>(weight), x, y, n, linear_);
}

void CudaDevice::route(const ModelConfig& config, const float* scores, int n, Routing& routing) {
  static_cast<CudaRouting&>(routing).route(stream_, config, scores, n);
}

void CudaDevice::dispatch(const Routing& routing, const float* x, float* out, int size) {
  static_cast<const CudaRouting&>(routing).dispatch(stream_, x, out, size);
}

void CudaDevice::linear_experts(const Weight& experts, const Routing& routing, const float* x, float* y) {
  const auto& r = static_cast<const CudaRouting&>(routing);
  multiply_experts(stream_, static_cast<const CudaWeight&>(experts), r.tiles(), x, y, r.num_choices(),
                   linear_);
}

void CudaDevice::combine(const Routing& routing, const float* y, float* out, int size) {
  static_cast<const CudaRouting&>(routing).combine(stream_, y, out, size);
}

// The batch on the GPU, with the rotation of its tokens: made in its first layer, read in the others.
DeviceBatch CudaDevice::prepare(const ModelConfig& config, const Batch& batch, int32_t num_blocks) {
  if (!step_.holds(config, batch)) stage(config, batch, /*padded=*/false);
  check(step_.largest_block() < num_blocks, "batch: block tables name blocks of the cache");
  num_blocks_ = num_blocks;
  DeviceBatch on_device = step_.on_device();
  on_device.cos_sin = cos_sin_.as<float>();
  if (!rotated_)
    compute_rotation(stream_, on_device, inv_freq_memory_.as<float>(), static_cast<int>(inv_freq_.size()),
                     config.rope_attention_factor, cos_sin_.as<float>());
  rotated_ = true;
  return on_device;
}

void CudaDevice::rope_store_kv(const ModelConfig& config, int layer, const Batch& batch, float* qkv,
                               KvCache& cache) {
  check(layer >= 0 && layer < config.num_hidden_layers, "rope_store_kv: layer exists");
  const DeviceBatch on_device = prepare(config, batch, cache.num_blocks);
  rope_store(stream_, config, layer, on_device, qkv, static_cast<CudaKvCache&>(cache));
}

SplitLimits CudaDevice::split_limits(const ModelConfig& config) const {
  const int enough = kBlocksPerProcessor * multiprocessors_;
  return {enough, kPartialsPerBlock * enough / config.num_key_value_heads};
}

void CudaDevice::attention(const ModelConfig& config, int layer, const Batch& batch, const float* qkv,
                           const KvCache& cache, float* out) {
  check(layer >= 0 && layer < config.num_hidden_layers, "attention: layer exists");
  const DeviceBatch on_device = prepare(config, batch, cache.num_blocks);
  attend(stream_, config, layer, on_device, step_.plan(window_of(config, layer)),
         slopes_.empty() ? nullptr : slopes_memory_.as<float>(), qkv, static_cast<const CudaKvCache&>(cache),
         out);
}

void CudaDevice::activation(Activation kind, bool gated, const float* x, float* out, int n, int size) {
  activate_rows(stream_, kind, gated, x, out, n, size);
}

void CudaDevice::add(float* x, const float* delta, int n, int size) {
  add_rows(stream_, x, delta, n, size);
}

void CudaDevice::gather_rows(const float* x, std::span<const int32_t> rows, float* out, int size) {
  if (rows.empty()) return;
  const int num_source_rows =
      step_.find(rows) ? step_.batch().num_tokens() : *std::ranges::max_element(rows) + 1;
  gather(stream_, x, num_source_rows, to_device(rows), static_cast<int>(rows.size()), out, size);
}

void CudaDevice::scale(float* x, float factor, int n, int size) {
  scale_rows(stream_, x, factor, n, size);
}

void CudaDevice::sample(float* logits, int vocab, std::span<const SamplingRow> rows, std::span<Sampled> out) {
  sampler_.sample(stream_, logits, vocab, rows, out);
}

void CudaDevice::score(float* logits, int vocab, std::span<const ScoringRow> rows,
                       std::span<TokenLogprobs> out) {
  sampler_.score(stream_, logits, vocab, rows, out);
}

}  // namespace engine::cuda
