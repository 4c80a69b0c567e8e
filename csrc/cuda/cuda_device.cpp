#include "cuda/cuda_device.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "cuda/make_cuda_device.h"
#include "cuda/pointwise.h"

namespace engine::cuda {
namespace {

constexpr int kBlocksPerProcessor = 2;  // of attention, below which partitions are worked on apart
constexpr int kPartialsPerBlock = 64;   // the most of them, for each of those blocks

class CudaBuffer : public Buffer {
 public:
  CudaBuffer(Arena& arena, size_t numbers) : memory_(arena, numbers * sizeof(float)) {
    data = memory_.as<float>();
    size = numbers;
  }

 private:
  DeviceMemory memory_;
};

int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

// Bytes of several arrays, each at a multiple of 16, to be copied to the device at once.
constexpr size_t kParcelSlack = 64;  // what a parcel of four arrays takes beside them
class Parcel {
 public:
  template <class T>
  size_t add(std::span<const T> values) {
    const size_t start = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(start + std::max<size_t>(1, values.size_bytes()));
    if (!values.empty()) std::memcpy(bytes_.data() + start, values.data(), values.size_bytes());
    return start;
  }
  void send(DeviceMemory& memory, cudaStream_t stream) const {
    memory.reserve(bytes_.size());
    copy_to_device(memory.as<std::byte>(), bytes_.data(), bytes_.size(), stream);
  }

 private:
  std::vector<std::byte> bytes_;
};

template <class T>
const T* at(const DeviceMemory& memory, size_t offset) {
  return reinterpret_cast<const T*>(memory.as<std::byte>() + offset);
}

int window_of(const ModelConfig& config, int layer) {
  return config.sliding_window.empty() ? 0 : config.sliding_window[static_cast<size_t>(layer)];
}

void check_tables(const Batch& batch, int32_t num_blocks) {
  check(batch.positions.size() == batch.tokens.size(), "batch: one position per token");
  int32_t next = 0;
  for (const BatchSequence& s : batch.sequences) {
    check(s.first_token == next && s.num_tokens > 0, "batch: sequences cover the tokens in order");
    next += s.num_tokens;
    const size_t end = static_cast<size_t>(s.first_block) +
                       static_cast<size_t>(divide_up(s.num_computed + s.num_tokens, kBlockSize));
    check(s.first_block >= 0 && end <= batch.block_tables.size(), "batch: block tables hold every token");
  }
  check(next == batch.num_tokens(), "batch: sequences cover the tokens");
  for (const int32_t block : batch.block_tables)
    check(block >= 0 && block < num_blocks, "batch: block tables name blocks of the cache");
}

std::vector<int64_t> slots_of(const Batch& batch) {
  std::vector<int64_t> slots;
  for (const BatchSequence& s : batch.sequences)
    for (int32_t i = s.num_computed; i < s.num_computed + s.num_tokens; ++i)
      slots.push_back(int64_t{batch.block_tables[static_cast<size_t>(s.first_block + i / kBlockSize)]} *
                          kBlockSize +
                      i % kBlockSize);
  return slots;
}

bool same_place(const Batch& a, const Batch& b) {
  const auto equal = [](const BatchSequence& x, const BatchSequence& y) {
    return x.first_token == y.first_token && x.num_tokens == y.num_tokens &&
           x.num_computed == y.num_computed && x.first_block == y.first_block;
  };
  return a.positions == b.positions && a.block_tables == b.block_tables &&
         std::ranges::equal(a.sequences, b.sequences, equal);
}

}  // namespace

CudaDevice::CudaDevice(int num_threads, Arithmetic arithmetic) : arithmetic_(arithmetic) {
  const std::string problem = cuda_problem();
  require(problem.empty(), problem);
  cuda_check(cudaSetDevice(0), "cudaSetDevice");
  cudaDeviceProp properties;
  cuda_check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  name_ = std::string("cuda (") + properties.name + ", " + std::to_string(properties.totalGlobalMem >> 20) +
          " MiB)";
  multiprocessors_ = properties.multiProcessorCount;
  cuda_check(cudaStreamCreate(&stream_), "cudaStreamCreate");
  cpu_ = make_device("cpu", num_threads, arithmetic);
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
  const auto tokens = static_cast<size_t>(max_tokens);
  linear_.reserve(max_tokens, std::max({c.hidden_size, c.q_size(), c.intermediate_size}));
  indices_.reserve(tokens * sizeof(int32_t));
  cos_sin_.reserve(2 * tokens * c.rope_inv_freq.size() * sizeof(float));
  partials_.reserve(static_cast<size_t>(max_partials(c) * c.num_key_value_heads) *
                    partial_numbers(c.head_dim) * sizeof(float));
  batch_memory_.reserve(tokens * (sizeof(int32_t) + sizeof(int64_t)) +
                        static_cast<size_t>(max_blocks) * sizeof(int32_t) + kParcelSlack);
  // A sequence's last tile may be a part of one.
  const size_t tiles =
      tokens + tokens * static_cast<size_t>(c.num_attention_heads / c.num_key_value_heads) / kTileRows;
  const size_t pieces = tiles + static_cast<size_t>(max_partials(c));
  for (int layer = 0; layer < c.num_hidden_layers; ++layer)
    plan_of(window_of(c, layer))
        .memory.reserve(tiles * (sizeof(AttentionTile) + sizeof(int32_t)) + pieces * sizeof(AttentionPiece) +
                        kParcelSlack);
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

const int32_t* CudaDevice::to_device(std::span<const int32_t> indices) {
  indices_.reserve(indices.size_bytes());
  copy_to_device(indices_.as<int32_t>(), indices.data(), indices.size_bytes(), stream_);
  return indices_.as<int32_t>();
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

// Brings the batch to the GPU, unless it is there.
void CudaDevice::prepare(const ModelConfig& config, const Batch& batch, int32_t num_blocks) {
  check_tables(batch, num_blocks);
  const bool same = same_place(batch, batch_);
  if (!same) {
    Parcel parcel;
    const std::vector<int64_t> slots = slots_of(batch);
    const size_t positions = parcel.add(std::span(batch.positions)), slot = parcel.add(std::span(slots)),
                 tables = parcel.add(std::span(batch.block_tables));
    parcel.send(batch_memory_, stream_);
    on_device_ = {batch.num_tokens(),
                  at<int32_t>(batch_memory_, positions),
                  at<int64_t>(batch_memory_, slot),
                  at<int32_t>(batch_memory_, tables),
                  static_cast<int>(batch.block_tables.size()),
                  nullptr};
    batch_ = batch;
    for (WindowPlan& plan : plans_) plan.current = false;
  }
  const bool same_rotation =
      config.rope_inv_freq == inv_freq_ && config.rope_attention_factor == attention_factor_;
  if (!same || !same_rotation) prepare_rotation(config);
}

void CudaDevice::prepare_rotation(const ModelConfig& config) {
  if (config.rope_inv_freq != inv_freq_) {
    inv_freq_ = config.rope_inv_freq;
    inv_freq_memory_.reserve(inv_freq_.size() * sizeof(float));
    copy_to_device(inv_freq_memory_.as<float>(), inv_freq_.data(), inv_freq_.size() * sizeof(float), stream_);
  }
  attention_factor_ = config.rope_attention_factor;
  cos_sin_.reserve(2 * static_cast<size_t>(on_device_.num_tokens) * inv_freq_.size() * sizeof(float));
  on_device_.cos_sin = cos_sin_.as<float>();
  compute_rotation(stream_, on_device_, inv_freq_memory_.as<float>(), static_cast<int>(inv_freq_.size()),
                   attention_factor_, cos_sin_.as<float>());
}

void CudaDevice::rope_store_kv(const ModelConfig& config, int layer, const Batch& batch, float* qkv,
                               KvCache& cache) {
  check(layer >= 0 && layer < config.num_hidden_layers, "rope_store_kv: layer exists");
  prepare(config, batch, cache.num_blocks);
  rope_store(stream_, config, layer, on_device_, qkv, static_cast<CudaKvCache&>(cache));
}

DevicePlan CudaDevice::upload_plan(const AttentionPlan& plan, const ModelConfig& config,
                                   DeviceMemory& memory) {
  Parcel parcel;
  const size_t tiles = parcel.add(std::span(plan.tiles)), pieces = parcel.add(std::span(plan.pieces)),
               split = parcel.add(std::span(plan.split_tiles));
  parcel.send(memory, stream_);
  DevicePlan on_device;
  on_device.num_tiles = static_cast<int>(plan.tiles.size());
  on_device.num_pieces = static_cast<int>(plan.pieces.size());
  on_device.num_split = static_cast<int>(plan.split_tiles.size());
  on_device.tiles = at<AttentionTile>(memory, tiles);
  on_device.pieces = at<AttentionPiece>(memory, pieces);
  on_device.split_tiles = at<int32_t>(memory, split);
  on_device.partial_numbers = static_cast<size_t>(plan.num_partials) *
                              static_cast<size_t>(config.num_key_value_heads) *
                              partial_numbers(config.head_dim);
  return on_device;
}

CudaDevice::WindowPlan& CudaDevice::plan_of(int window) {
  auto found = std::ranges::find(plans_, window, &WindowPlan::window);
  if (found == plans_.end())
    found = plans_.insert(found, WindowPlan{window, false, {}, DeviceMemory(arena_)});
  return *found;
}

int CudaDevice::enough_blocks() const {
  return kBlocksPerProcessor * multiprocessors_;
}

int CudaDevice::max_partials(const ModelConfig& config) const {
  return kPartialsPerBlock * enough_blocks() / config.num_key_value_heads;
}

const DevicePlan& CudaDevice::plan(const ModelConfig& config, int layer, const Batch& batch) {
  WindowPlan& found = plan_of(window_of(config, layer));
  if (!found.current) {
    const AttentionPlan made =
        plan_attention(batch, config.num_attention_heads / config.num_key_value_heads,
                       config.num_key_value_heads, found.window, enough_blocks(), max_partials(config));
    found.plan = upload_plan(made, config, found.memory);
    found.current = true;
  }
  partials_.reserve(found.plan.partial_numbers * sizeof(float));
  found.plan.partials = partials_.as<float>();
  return found.plan;
}

void CudaDevice::attention(const ModelConfig& config, int layer, const Batch& batch, const float* qkv,
                           const KvCache& cache, float* out) {
  check(layer >= 0 && layer < config.num_hidden_layers, "attention: layer exists");
  prepare(config, batch, cache.num_blocks);
  if (config.alibi_slopes != slopes_) {
    slopes_ = config.alibi_slopes;
    slopes_memory_.reserve(slopes_.size() * sizeof(float));
    copy_to_device(slopes_memory_.as<float>(), slopes_.data(), slopes_.size() * sizeof(float), stream_);
  }
  attend(stream_, config, layer, on_device_, plan(config, layer, batch),
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
  const int num_source_rows = *std::ranges::max_element(rows) + 1;
  gather(stream_, x, num_source_rows, to_device(rows), static_cast<int>(rows.size()), out, size);
}

void CudaDevice::scale(float* x, float factor, int n, int size) {
  scale_rows(stream_, x, factor, n, size);
}

float* CudaDevice::logits_on_host(const float* logits, int vocab, size_t rows) {
  host_logits_.resize(rows * static_cast<size_t>(vocab));
  copy_to_host(host_logits_.data(), logits, host_logits_.size());
  return host_logits_.data();
}

void CudaDevice::sample(float* logits, int vocab, std::span<const SamplingRow> rows, std::span<Sampled> out) {
  cpu_->sample(logits_on_host(logits, vocab, rows.size()), vocab, rows, out);
}

void CudaDevice::score(float* logits, int vocab, std::span<const ScoringRow> rows,
                       std::span<TokenLogprobs> out) {
  cpu_->score(logits_on_host(logits, vocab, rows.size()), vocab, rows, out);
}

}  // namespace engine::cuda
