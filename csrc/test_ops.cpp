// Thread pool, pointwise kernels, attention and sampler, for the tests: a Device on numpy arrays. Results are
// written into arrays that the caller made.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "base/check.h"
#include "base/random.h"
#include "cpu/cpu_device.h"
#include "cpu/pointwise.h"
#include "test_device.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace engine {
namespace {

using Vector = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BatchRows =
    std::vector<std::tuple<int32_t, int32_t, std::vector<int32_t>>>;  // num_tokens, num_computed, blocks

int rows(const Matrix& m) {
  return static_cast<int>(m.shape(0));
}
int cols(const Matrix& m) {
  return static_cast<int>(m.shape(1));
}

// Fields by name; a name that is none is an error.
class Fields {
 public:
  explicit Fields(nb::dict values) : values_(std::move(values)) {}
  ~Fields() noexcept(false) {
    if (std::uncaught_exceptions() == 0) check(read_ == values_.size(), "every field is known");
  }
  template <class T>
  void operator()(const char* name, T& field) {
    if (!values_.contains(name)) return;
    field = nb::cast<T>(values_[name]);
    ++read_;
  }

 private:
  nb::dict values_;
  size_t read_ = 0;
};

ModelConfig make_config(nb::dict values) {
  ModelConfig config;
  Fields read(std::move(values));
  read("num_hidden_layers", config.num_hidden_layers);
  read("num_attention_heads", config.num_attention_heads);
  read("num_key_value_heads", config.num_key_value_heads);
  read("head_dim", config.head_dim);
  read("attention_scale", config.attention_scale);
  read("clip_qkv", config.clip_qkv);
  read("rope_inv_freq", config.rope_inv_freq);
  read("rope_interleaved", config.rope_interleaved);
  read("rope_attention_factor", config.rope_attention_factor);
  read("alibi_slopes", config.alibi_slopes);
  read("sliding_window", config.sliding_window);
  read("vocab_size", config.vocab_size);
  return config;
}

SamplingParams make_params(nb::dict values) {
  SamplingParams params;
  Fields read(std::move(values));
  read("temperature", params.temperature);
  read("top_p", params.top_p);
  read("min_p", params.min_p);
  read("top_k", params.top_k);
  read("presence_penalty", params.presence_penalty);
  read("frequency_penalty", params.frequency_penalty);
  read("repetition_penalty", params.repetition_penalty);
  read("logit_bias", params.logit_bias);
  read("seed", params.seed);
  read("num_logprobs", params.num_logprobs);
  read("min_tokens", params.min_tokens);
  read("stop_token_ids", params.stop_token_ids);
  read("allowed_token_ids", params.allowed_token_ids);
  read("bad_words", params.bad_words);
  read("logprob_token_ids", params.logprob_token_ids);
  return params;
}

Batch make_batch(const BatchRows& sequences) {
  Batch batch;
  for (const auto& [num_tokens, num_computed, blocks] : sequences) {
    batch.sequences.push_back(
        {batch.num_tokens(), num_tokens, num_computed, static_cast<int32_t>(batch.block_tables.size())});
    for (int32_t i = 0; i < num_tokens; ++i) batch.positions.push_back(num_computed + i);
    batch.tokens.resize(batch.positions.size());
    batch.block_tables.insert(batch.block_tables.end(), blocks.begin(), blocks.end());
  }
  return batch;
}

Format format_named(const std::string& name) {
  for (const Format format : {Format::F32, Format::F16, Format::BF16, Format::INT8})
    if (name == format_name(format)) return format;
  throw InputError("no format of the key/value cache is called " + name);
}

// One device, one config, one cache.
class AttentionFixture {
 public:
  AttentionFixture(const std::string& isa, int num_threads, nb::dict config, const std::string& format,
                   int num_blocks)
      : config_(make_config(std::move(config))),
        device_(make_test_device(isa, num_threads, Arithmetic::EXACT)),
        cache_(device_->kv_alloc(config_, format_named(format), num_blocks)) {}

  void fill_block(int32_t block, uint8_t value) { engine::fill_block(*cache_, block, value); }
  size_t cache_bytes() const { return engine::cache_bytes(*cache_); }
  size_t kv_bytes_per_block() const { return device_->kv_bytes_per_block(config_, cache_->format); }

  void rope_store_kv(const BatchRows& sequences, int layer, Matrix qkv) {
    const Batch batch = make_batch(sequences);
    check(rows(qkv) == batch.num_tokens() && cols(qkv) == config_.qkv_size(), "qkv (num_tokens, qkv_size)");
    nb::gil_scoped_release release;
    OnDevice rows(*device_, qkv);
    device_->rope_store_kv(config_, layer, batch, rows.data(), *cache_);
    rows.fetch();
  }
  void attention(const BatchRows& sequences, int layer, Matrix qkv, Matrix out, int repeat) {
    const Batch batch = make_batch(sequences);
    check(rows(qkv) == batch.num_tokens() && cols(qkv) == config_.qkv_size(), "qkv (num_tokens, qkv_size)");
    check(rows(out) == batch.num_tokens() && cols(out) == config_.q_size(), "out (num_tokens, q_size)");
    nb::gil_scoped_release release;
    OnDevice in(*device_, qkv), attended(*device_, out);
    for (int i = 0; i < repeat; ++i)
      device_->attention(config_, layer, batch, in.data(), *cache_, attended.data());
    attended.fetch();
  }

 private:
  ModelConfig config_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<KvCache> cache_;
};

Norm norm_named(const std::string& kind) {
  return kind == "rms" ? Norm::RMS : Norm::LAYER;
}

// A vector that may be missing, in the device's memory.
class OptionalOnDevice {
 public:
  OptionalOnDevice(Device& device, std::optional<Vector>& vector) {
    if (vector) vector_.emplace(device, *vector);
  }
  const float* data() { return vector_ ? vector_->data() : nullptr; }

 private:
  std::optional<OnDevice> vector_;
};

void norm(Device& device, const std::string& kind, float eps, Vector weight, std::optional<Vector> bias,
          Matrix x, Matrix out) {
  OnDevice factor(device, weight), in(device, x), normed(device, out);
  OptionalOnDevice shift(device, bias);
  device.norm(norm_named(kind), eps, factor.data(), shift.data(), in.data(), normed.data(), rows(x), cols(x));
  normed.fetch();
}

void add_norm(Device& device, const std::string& kind, float eps, Vector weight, std::optional<Vector> bias,
              Matrix x, Matrix delta, Matrix out, bool composed) {
  OnDevice factor(device, weight), sum(device, x), more(device, delta), normed(device, out);
  OptionalOnDevice shift(device, bias);
  if (composed)
    device.Device::add_norm(norm_named(kind), eps, factor.data(), shift.data(), sum.data(), more.data(),
                            normed.data(), rows(x), cols(x));
  else
    device.add_norm(norm_named(kind), eps, factor.data(), shift.data(), sum.data(), more.data(),
                    normed.data(), rows(x), cols(x));
  sum.fetch();
  normed.fetch();
}

void activation(Device& device, const std::string& kind, bool gated, Matrix x, Matrix out) {
  const std::vector<std::string> names = {"silu", "gelu", "gelu_tanh", "relu"};
  const auto found = std::find(names.begin(), names.end(), kind);
  check(found != names.end(), "the activation is known");
  OnDevice in(device, x), activated(device, out);
  device.activation(static_cast<Activation>(found - names.begin()), gated, in.data(), activated.data(),
                    rows(out), cols(out));
  activated.fetch();
}

void add(Device& device, Matrix x, Matrix delta) {
  OnDevice sum(device, x), more(device, delta);
  device.add(sum.data(), more.data(), rows(x), cols(x));
  sum.fetch();
}

void scale(Device& device, Matrix x, float factor) {
  OnDevice scaled(device, x);
  device.scale(scaled.data(), factor, rows(x), cols(x));
  scaled.fetch();
}

void gather_rows(Device& device, Matrix x, const std::vector<int32_t>& indices, Matrix out) {
  OnDevice in(device, x), gathered(device, out);
  device.gather_rows(in.data(), indices, gathered.data(), cols(x));
  gathered.fetch();
}

// params, tokens so far, num_prompt, position
using SampleRequest = std::tuple<nb::dict, std::vector<int32_t>, int32_t, uint64_t>;
using PlainLogprobs = std::vector<std::tuple<int32_t, float, int32_t>>;
using SampleResult = std::pair<int32_t, PlainLogprobs>;

PlainLogprobs plain(const TokenLogprobs& logprobs) {
  PlainLogprobs out;
  for (const TokenLogprob& one : logprobs) out.emplace_back(one.token, one.logprob, one.rank);
  return out;
}

using Mask = std::optional<std::vector<uint32_t>>;

// masks: one of each request, or none.
std::vector<SampleResult> sample(Device& device, Matrix logits, const std::vector<SampleRequest>& requests,
                                 const std::vector<Mask>& masks) {
  std::vector<SamplingParams> params;
  for (const auto& request : requests) params.push_back(make_params(std::get<0>(request)));
  std::vector<SamplingRow> sampling;
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto& [_, tokens, num_prompt, position] = requests[i];
    const uint32_t* mask = i < masks.size() && masks[i] ? masks[i]->data() : nullptr;
    sampling.push_back({&params[i], tokens, num_prompt, position, mask});
  }
  check(sampling.size() == logits.shape(0), "one request per row");
  std::vector<Sampled> sampled(sampling.size());
  {
    nb::gil_scoped_release release;
    OnDevice on_device(device, logits);
    device.sample(on_device.data(), cols(logits), sampling, sampled);
  }
  std::vector<SampleResult> results;
  for (const Sampled& row : sampled) results.emplace_back(row.token, plain(row.logprobs));
  return results;
}

std::vector<SampleResult> score(Device& device, Matrix logits,
                                const std::vector<std::pair<int32_t, int32_t>>& tokens) {
  std::vector<ScoringRow> scoring;
  for (const auto& [token, num_logprobs] : tokens) scoring.push_back({token, num_logprobs});
  check(scoring.size() == logits.shape(0), "one token per row");
  std::vector<TokenLogprobs> scored(scoring.size());
  OnDevice on_device(device, logits);
  device.score(on_device.data(), cols(logits), scoring, scored);
  std::vector<SampleResult> results;
  for (size_t i = 0; i < scored.size(); ++i) results.emplace_back(scoring[i].token, plain(scored[i]));
  return results;
}

// Runs `runs` times, `num_tasks` tasks each; returns how often each task ran.
std::vector<int> count_tasks(int num_threads, int runs, int num_tasks) {
  nb::gil_scoped_release release;
  ThreadPool pool(num_threads);
  std::vector<int> counts(static_cast<size_t>(num_tasks));
  for (int run = 0; run < runs; ++run)
    pool.run(num_tasks, [&](int task, int worker) {
      check(worker >= 0 && worker < pool.size(), "workers are numbered from 0");
      ++counts[static_cast<size_t>(task)];
    });
  return counts;
}

// Task `task` of `num_tasks` throws, `runs` times; returns how many exceptions arrived.
int throw_in_task(int num_threads, int runs, int num_tasks, int task) {
  nb::gil_scoped_release release;
  ThreadPool pool(num_threads);
  int caught = 0;
  for (int run = 0; run < runs; ++run) {
    try {
      pool.run(num_tasks, [&](int index, int) {
        if (index == task) throw std::out_of_range("task " + std::to_string(index));
      });
    } catch (const std::out_of_range& error) {
      caught += error.what() == "task " + std::to_string(task);
    }
  }
  return caught;
}

void run_in_task(int num_threads) {
  ThreadPool pool(num_threads);
  pool.run(4, [&](int, int) { pool.run(4, [](int, int) {}); });
}

void bind_device(nb::module_& m) {
  nb::class_<Device>(m, "Device")
      .def(nb::new_([](const std::string& isa, int num_threads) {
        return make_test_device(isa, num_threads, Arithmetic::EXACT);
      }))
      .def_prop_ro("name", &Device::name)
      .def("memory_available", &Device::memory_available)
      .def("reserve_scratch",
           [](Device& device, nb::dict config, int max_tokens, int64_t max_blocks) {
             return device.reserve_scratch(make_config(std::move(config)), max_tokens, max_blocks);
           })
      .def("norm", norm, "kind"_a, "eps"_a, "weight"_a, "bias"_a.none(), "x"_a, "out"_a)
      .def("add_norm", add_norm, "kind"_a, "eps"_a, "weight"_a, "bias"_a.none(), "x"_a, "delta"_a, "out"_a,
           "composed"_a)
      .def("activation", activation)
      .def("add", add)
      .def("scale", scale)
      .def("gather_rows", gather_rows)
      .def("upload_address",
           [](Device& d, Vector x) {
             const auto buffer = d.upload({x.data(), x.size()});
             std::vector<float> back(buffer->size);
             d.copy_to_host(back.data(), buffer->data, back.size());
             check(std::memcmp(back.data(), x.data(), x.size() * sizeof(float)) == 0,
                   "upload keeps the numbers");
             return reinterpret_cast<uintptr_t>(buffer->data);
           })
      .def("sample", sample, "logits"_a, "requests"_a, "masks"_a = std::vector<Mask>())
      .def("score", score);
}

}  // namespace
}  // namespace engine

void bind_ops(nb::module_& m) {
  using namespace engine;
  bind_device(m);
  nb::class_<AttentionFixture>(m, "Attention")
      .def(nb::init<const std::string&, int, nb::dict, const std::string&, int>(), "isa"_a, "num_threads"_a,
           "config"_a, "format"_a, "num_blocks"_a)
      .def("fill_block", &AttentionFixture::fill_block)
      .def_prop_ro("cache_bytes", &AttentionFixture::cache_bytes)
      .def_prop_ro("kv_bytes_per_block", &AttentionFixture::kv_bytes_per_block)
      .def("rope_store_kv", &AttentionFixture::rope_store_kv, "sequences"_a, "layer"_a, "qkv"_a)
      .def("attention", &AttentionFixture::attention, "sequences"_a, "layer"_a, "qkv"_a, "out"_a,
           "repeat"_a = 1);
  m.def("exp", [](const std::string& isa, Vector x, float shift, float factor, Vector out) {
    kernels_named(isa).pointwise->exp(x.data(), shift, factor, out.data(), x.size());
  });
  m.def("max", [](const std::string& isa, Vector x) {
    return kernels_named(isa).pointwise->max(x.data(), x.size());
  });
  m.def("make_device",
        [](const std::string& kind) { return make_device({.kind = kind, .num_threads = 1})->name(); });
  m.def("random_uniform", &random_uniform);
  m.def("count_tasks", &count_tasks);
  m.def("throw_in_task", &throw_in_task);
  m.def("run_in_task", &run_in_task);
}
