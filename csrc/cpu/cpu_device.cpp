#include "cpu/cpu_device.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>

#include "base/check.h"
#include "cpu/linear.h"
#include "cpu/pointwise.h"
#include "cpu/routing.h"

namespace engine {
namespace {

constexpr size_t kAlignment = 64;       // a cache line, and a vector of AVX-512
constexpr int64_t kTaskNumbers = 8192;  // below this, handing a task to another core costs more than doing it

class CpuBuffer : public Buffer {
 public:
  explicit CpuBuffer(size_t numbers) {
    const size_t bytes =
        (std::max<size_t>(1, numbers) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
    data = static_cast<float*>(std::aligned_alloc(kAlignment, bytes));
    require(data != nullptr, "out of memory: a buffer takes " + std::to_string(bytes >> 20) + " MiB");
    size = numbers;
  }
  ~CpuBuffer() override { std::free(data); }
};

// The number after `key` in a file of "key value" or "key: value kB" lines; the first number for an empty
// key.
std::optional<size_t> read_number(const std::filesystem::path& path, const std::string& key) {
  std::ifstream file(path);
  size_t value;
  if (key.empty()) return file >> value ? std::optional(value) : std::nullopt;
  for (std::string word; file >> word;)
    if (word == key && file >> value) return value;
  return std::nullopt;
}

struct Cgroup {  // file names of one version of the interface; Linux's admin-guide/cgroup-v{1,2}
  const char *mount, *limit, *usage, *cache;
};
constexpr Cgroup kCgroup1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                             "total_inactive_file"};
constexpr Cgroup kCgroup2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"};

// What the control group at `path` and those above it still allow. Pages of files that nobody uses do not
// count as used.
size_t cgroup_available(const Cgroup& cgroup, std::string path) {
  size_t available = std::numeric_limits<size_t>::max();
  while (true) {
    const std::filesystem::path folder = cgroup.mount + path;
    const auto limit = read_number(folder / cgroup.limit, ""), usage = read_number(folder / cgroup.usage, "");
    if (limit && usage) {
      const size_t cache = read_number(folder / "memory.stat", cgroup.cache).value_or(0);
      const size_t used = *usage - std::min(*usage, cache);
      available = std::min(available, *limit - std::min(*limit, used));
    }
    if (path.empty()) return available;
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
}

// Lines of /proc/self/cgroup: "0::/path" is version 2, "N:controllers:/path" version 1.
size_t cgroups_available() {
  size_t available = std::min(cgroup_available(kCgroup1, ""), cgroup_available(kCgroup2, ""));
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1),
                      path = line.substr(second + 1);
    if (controllers.empty()) available = std::min(available, cgroup_available(kCgroup2, path));
    if (controllers == "memory") available = std::min(available, cgroup_available(kCgroup1, path));
  }
  return available;
}

}  // namespace

CpuDevice::CpuDevice(const Kernels& kernels, int num_threads, Arithmetic arithmetic)
    : kernels_(kernels),
      arithmetic_(arithmetic),
      pool_(num_threads),
      attention_(kernels_, pool_),
      sampler_(kernels_, pool_) {}

std::string CpuDevice::name() const {
  return "cpu (" + std::string(kernels_.name) + ", " + std::to_string(pool_.size()) +
         (pool_.size() == 1 ? " thread)" : " threads)");
}

std::unique_ptr<Buffer> CpuDevice::alloc(size_t numbers) {
  return std::make_unique<CpuBuffer>(numbers);
}

void CpuDevice::copy_to_host(float* host, const float* device, size_t numbers) {
  std::copy_n(device, numbers, host);
}

size_t CpuDevice::memory_available() const {
  const auto kib = read_number("/proc/meminfo", "MemAvailable:");
  require(kib.has_value(),
          "cannot read MemAvailable from /proc/meminfo; give the engine's memory explicitly");
  return std::min(*kib * 1024, cgroups_available());
}

// The second-level cache's worth. Weights are read once for each such piece, which fewer rows would not pay
// for.
int CpuDevice::rows_at_once(size_t row_bytes) const {
  const long cache = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or -1 where it is not known
  const size_t rows = static_cast<size_t>(std::max(cache, 0L)) / row_bytes;
  return static_cast<int>(std::clamp<size_t>(rows / kRowTile * kRowTile, 4 * kRowTile, 32 * kRowTile));
}

std::unique_ptr<Weight> CpuDevice::pack(std::span<const Tensor> sources, std::span<const float> bias) {
  return pack_weight(kernels_, pool_, arena_, sources, bias, arithmetic_);
}

std::unique_ptr<Buffer> CpuDevice::upload(std::span<const float> host) {
  auto buffer = alloc(host.size());
  std::copy(host.begin(), host.end(), buffer->data);
  return buffer;
}

size_t CpuDevice::kv_bytes_per_block(const ModelConfig& config, Format format) const {
  return CpuKvCache::head_bytes(config, format) * static_cast<size_t>(config.num_key_value_heads) *
         static_cast<size_t>(config.num_hidden_layers);
}

std::unique_ptr<KvCache> CpuDevice::kv_alloc(const ModelConfig& config, Format format, int32_t num_blocks) {
  return std::make_unique<CpuKvCache>(config, format, num_blocks);
}

std::unique_ptr<Routing> CpuDevice::routing_alloc(const ModelConfig& config, int max_tokens) {
  return std::make_unique<CpuRouting>(config, max_tokens);
}

size_t CpuDevice::routing_bytes(const ModelConfig& config, int max_tokens) const {
  return CpuRouting::bytes(config, max_tokens);
}

// Calls rows(first, count) for pieces of [0, n) that are worth a task.
template <class F>
void CpuDevice::for_rows(int n, int size, F&& rows) {
  check(n >= 0 && size > 0, "an op has rows of at least one number");
  const int per_task = static_cast<int>(std::clamp<int64_t>(kTaskNumbers / size, 1, std::max(1, n)));
  pool_.run((n + per_task - 1) / per_task, [&](int task, int) {
    const int first = task * per_task;
    rows(static_cast<size_t>(first), static_cast<size_t>(std::min(per_task, n - first)));
  });
}

void CpuDevice::embed(const Weight& table, std::span<const int32_t> tokens, float* out) {
  engine::embed(kernels_, table, tokens, out);
}

void CpuDevice::norm(Norm kind, float eps, const float* weight, const float* bias, const float* x, float* out,
                     int n, int size) {
  const auto norm_row = kernels_.pointwise->norm[static_cast<int>(kind)];
  const auto width = static_cast<size_t>(size);
  for_rows(n, size, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row)
      norm_row(x + row * width, weight, bias, eps, out + row * width, size);
  });
}

// The sum is normalised while it is in the nearest cache, and the threads meet once rather than twice.
void CpuDevice::add_norm(Norm kind, float eps, const float* weight, const float* bias, float* x,
                         const float* delta, float* out, int n, int size) {
  const auto norm_row = kernels_.pointwise->norm[static_cast<int>(kind)];
  const auto width = static_cast<size_t>(size);
  for_rows(n, size, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row) {
      kernels_.pointwise->add(x + row * width, delta + row * width, width);
      norm_row(x + row * width, weight, bias, eps, out + row * width, size);
    }
  });
}

void CpuDevice::linear(const Weight& weight, const float* x, float* y, int n) {
  engine::linear(kernels_, pool_, weight, x, y, n, rounded_);
}

void CpuDevice::route(const ModelConfig& config, const float* scores, int n, Routing& routing) {
  auto& r = static_cast<CpuRouting&>(routing);
  for_rows(n, config.num_experts,
           [&](size_t first, size_t count) { r.choose(config, kernels_, scores, first, count); });
  r.sort(n);
}

void CpuDevice::dispatch(const Routing& routing, const float* x, float* out, int size) {
  const auto& r = static_cast<const CpuRouting&>(routing);
  const auto width = static_cast<size_t>(size);
  for_rows(r.n() * r.per_row(), size, [&](size_t first, size_t count) {
    for (size_t choice = first; choice < first + count; ++choice)
      std::memcpy(out + choice * width, x + r.row_of(choice) * width, width * sizeof(float));
  });
}

void CpuDevice::linear_experts(const Weight& experts, const Routing& routing, const float* x, float* y) {
  const auto& r = static_cast<const CpuRouting&>(routing);
  engine::linear_experts(kernels_, pool_, experts, r.first_choices(), x, y, rounded_);
}

void CpuDevice::combine(const Routing& routing, const float* y, float* out, int size) {
  const auto& r = static_cast<const CpuRouting&>(routing);
  const auto width = static_cast<size_t>(size);
  for_rows(r.n(), size, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row) {
      const auto choices = r.choices_of(row);
      const auto shares = r.shares_of(row);
      float* sum = out + row * width;
      std::fill_n(sum, width, 0.0f);
      for (size_t j = 0; j < choices.size(); ++j)
        kernels_.pointwise->add_share(sum, y + static_cast<size_t>(choices[j]) * width, shares[j], width);
    }
  });
}

void CpuDevice::rope_store_kv(const ModelConfig& config, int layer, const Batch& batch, float* qkv,
                              KvCache& cache) {
  attention_.rope_store_kv(config, layer, batch, qkv, static_cast<CpuKvCache&>(cache));
}

void CpuDevice::attention(const ModelConfig& config, int layer, const Batch& batch, const float* qkv,
                          const KvCache& cache, float* out) {
  attention_.attend(config, layer, batch, qkv, static_cast<const CpuKvCache&>(cache), out);
}

void CpuDevice::activation(Activation kind, bool gated, const float* x, float* out, int n, int size) {
  const auto activate = kernels_.pointwise->activation[static_cast<int>(kind)];
  const auto width = static_cast<size_t>(size);
  for_rows(n, size, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row) {
      const float* in = x + row * (gated ? 2 * width : width);
      activate(in, gated ? in + width : nullptr, out + row * width, size);
    }
  });
}

void CpuDevice::add(float* x, const float* delta, int n, int size) {
  const auto width = static_cast<size_t>(size);
  for_rows(n, size, [&](size_t first, size_t count) {
    kernels_.pointwise->add(x + first * width, delta + first * width, count * width);
  });
}

void CpuDevice::gather_rows(const float* x, std::span<const int32_t> rows, float* out, int size) {
  const auto width = static_cast<size_t>(size);
  for_rows(static_cast<int>(rows.size()), size, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row)
      std::memcpy(out + row * width, x + static_cast<size_t>(rows[row]) * width, width * sizeof(float));
  });
}

void CpuDevice::scale(float* x, float factor, int n, int size) {
  const auto width = static_cast<size_t>(size);
  for_rows(n, size, [&](size_t first, size_t count) {
    kernels_.pointwise->scale(x + first * width, factor, count * width);
  });
}

void CpuDevice::sample(float* logits, int vocab, std::span<const SamplingRow> rows, std::span<Sampled> out) {
  sampler_.sample(logits, vocab, rows, out);
}

void CpuDevice::score(float* logits, int vocab, std::span<const ScoringRow> rows,
                      std::span<TokenLogprobs> out) {
  sampler_.score(logits, vocab, rows, out);
}

}  // namespace engine
