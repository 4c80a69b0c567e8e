// The extension module: a few structs and one Engine. No logic lives here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <new>

#include "base/check.h"
#include "base/quant.h"
#include "cuda/make_cuda_device.h"
#include "engine/engine.h"

namespace nb = nanobind;
using namespace engine;

namespace {

// Enums cross the border as the names that the wire and the checkpoints use.
template <class Enum, size_t N>
struct Names {
  std::array<const char*, N> names;

  const char* operator()(Enum value) const { return names[static_cast<size_t>(value)]; }
  Enum parse(const char* what, const std::string& name) const {
    for (size_t i = 0; i < N; ++i)
      if (name == names[i]) return static_cast<Enum>(i);
    std::string all;
    for (const char* n : names) all += (all.empty() ? "" : ", ") + std::string(n);
    throw InputError(std::string(what) + " is \"" + name + "\", expected one of: " + all);
  }
};

constexpr Names<Norm, 2> kNorms{{"rms", "layer"}};
constexpr Names<Activation, 4> kActivations{{"silu", "gelu", "gelu_tanh", "relu"}};
constexpr Names<Pooling, 3> kPoolings{{"", "last", "mean"}};
constexpr Names<Finish, 6> kFinishes{{"", "stop", "length", "abort", "error", "repetition"}};

Format parse_format(const std::string& name) {
  for (int i = 0; i < kNumFormats; ++i)
    if (name == format_name(static_cast<Format>(i))) return static_cast<Format>(i);
  throw InputError("format \"" + name + "\" is unknown");
}

using LogprobTuple = std::tuple<int32_t, float, int32_t>;

std::vector<std::vector<LogprobTuple>> logprob_tuples(const std::vector<TokenLogprobs>& tokens) {
  std::vector<std::vector<LogprobTuple>> out;
  for (const TokenLogprobs& token : tokens) {
    auto& row = out.emplace_back();
    for (const TokenLogprob& l : token) row.emplace_back(l.token, l.logprob, l.rank);
  }
  return out;
}

nb::bytes dequantize(const std::string& format_text, nb::bytes data, int64_t count) {
  const Format format = parse_format(format_text);
  require(count >= 0 && count % block_size(format) == 0, "count must be a multiple of the format's block");
  require(row_bytes(format, count) == data.size(), "data has " + std::to_string(data.size()) +
                                                       " bytes, expected " +
                                                       std::to_string(row_bytes(format, count)));
  std::vector<float> out(static_cast<size_t>(count));
  dequantize_row(format, data.c_str(), out.data(), count);
  return nb::bytes(reinterpret_cast<const char*>(out.data()), out.size() * sizeof(float));
}

using Bytes = nb::ndarray<nb::ro, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Here, and not in Python with the rest of a header, because a vocabulary has 100,000 of them.
std::pair<nb::list, uint64_t> read_strings(const Bytes& data, uint64_t position, uint64_t end,
                                           uint64_t count) {
  require(position <= end && end <= data.size(), "position and end must lie in the data, in this order");
  nb::list strings;
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t length;
    const uint64_t start = position + sizeof length;
    if (start > end) return {strings, start};
    std::memcpy(&length, data.data() + position, sizeof length);
    position = start + std::min(length, UINT64_MAX - start);
    if (position > end) break;
    PyObject* text = PyUnicode_DecodeUTF8(reinterpret_cast<const char*>(data.data()) + start,
                                          static_cast<Py_ssize_t>(length), nullptr);
    if (text == nullptr) nb::raise_python_error();
    strings.append(nb::steal(text));
  }
  return {strings, position};
}

using DemandTuple = std::tuple<uint64_t, std::vector<int32_t>, uintptr_t>;
using AnswerTuple = std::tuple<std::vector<int32_t>, std::string>;

std::optional<std::vector<DemandTuple>> wait_masks(Engine& engine) {
  auto demands = engine.masks().wait();
  if (!demands) return std::nullopt;
  std::vector<DemandTuple> out;
  for (MaskDemand& d : *demands)
    out.emplace_back(d.request_id, std::move(d.tokens), reinterpret_cast<uintptr_t>(d.mask));
  return out;
}

void answer_masks(Engine& engine, std::vector<AnswerTuple> tuples) {
  std::vector<MaskAnswer> answers;
  for (auto& [forced, error] : tuples) answers.push_back({std::move(forced), std::move(error)});
  engine.masks().answer(std::move(answers));
}

void bind_config(nb::module_& m) {
  nb::class_<ModelConfig>(m, "ModelConfig")
      .def(nb::init<>())
      .def_rw("vocab_size", &ModelConfig::vocab_size)
      .def_rw("hidden_size", &ModelConfig::hidden_size)
      .def_rw("intermediate_size", &ModelConfig::intermediate_size)
      .def_rw("num_hidden_layers", &ModelConfig::num_hidden_layers)
      .def_rw("num_attention_heads", &ModelConfig::num_attention_heads)
      .def_rw("num_key_value_heads", &ModelConfig::num_key_value_heads)
      .def_rw("head_dim", &ModelConfig::head_dim)
      .def_prop_rw(
          "norm", [](const ModelConfig& c) { return kNorms(c.norm); },
          [](ModelConfig& c, const std::string& name) { c.norm = kNorms.parse("norm", name); })
      .def_rw("norm_eps", &ModelConfig::norm_eps)
      .def_prop_rw(
          "activation", [](const ModelConfig& c) { return kActivations(c.activation); },
          [](ModelConfig& c, const std::string& name) {
            c.activation = kActivations.parse("activation", name);
          })
      .def_rw("gated_mlp", &ModelConfig::gated_mlp)
      .def_rw("num_experts", &ModelConfig::num_experts)
      .def_rw("num_experts_per_tok", &ModelConfig::num_experts_per_tok)
      .def_rw("norm_topk_prob", &ModelConfig::norm_topk_prob)
      .def_rw("attention_scale", &ModelConfig::attention_scale)
      .def_rw("clip_qkv", &ModelConfig::clip_qkv)
      .def_rw("logit_scale", &ModelConfig::logit_scale)
      .def_rw("rope_inv_freq", &ModelConfig::rope_inv_freq)
      .def_rw("rope_interleaved", &ModelConfig::rope_interleaved)
      .def_rw("rope_attention_factor", &ModelConfig::rope_attention_factor)
      .def_rw("alibi_slopes", &ModelConfig::alibi_slopes)
      .def_rw("sliding_window", &ModelConfig::sliding_window);

  nb::class_<TensorInfo>(m, "TensorInfo")
      .def(
          "__init__",
          [](TensorInfo* self, std::string name, const std::string& format, std::vector<int64_t> shape,
             std::string file, uint64_t offset) {
            new (self)
                TensorInfo{std::move(name), parse_format(format), std::move(shape), std::move(file), offset};
          },
          nb::arg("name"), nb::arg("format"), nb::arg("shape"), nb::arg("file"), nb::arg("offset"))
      .def_ro("name", &TensorInfo::name)
      .def_prop_ro("format", [](const TensorInfo& t) { return format_name(t.format); })
      .def_ro("shape", &TensorInfo::shape)
      .def_ro("file", &TensorInfo::file)
      .def_ro("offset", &TensorInfo::offset);
}

void bind_requests(nb::module_& m) {
  nb::class_<EngineOptions>(m, "EngineOptions")
      .def(nb::init<>())
      .def_rw("device", &EngineOptions::device)
      .def_rw("num_threads", &EngineOptions::num_threads)
      .def_rw("memory_bytes", &EngineOptions::memory_bytes)
      .def_rw("gpu_memory_utilization", &EngineOptions::gpu_memory_utilization)
      .def_rw("max_model_len", &EngineOptions::max_model_len)
      .def_rw("max_position", &EngineOptions::max_position)
      .def_rw("max_num_seqs", &EngineOptions::max_num_seqs)
      .def_rw("max_num_batched_tokens", &EngineOptions::max_num_batched_tokens)
      .def_prop_rw(
          "kv_format", [](const EngineOptions& o) { return format_name(o.kv_format); },
          [](EngineOptions& o, const std::string& name) { o.kv_format = parse_format(name); })
      .def_rw("weight_format", &EngineOptions::weight_format)
      .def_rw("exact", &EngineOptions::exact)
      .def_rw("enforce_eager", &EngineOptions::enforce_eager)
      .def_rw("enable_prefix_caching", &EngineOptions::enable_prefix_caching);

  nb::class_<SamplingParams>(m, "SamplingParams")
      .def(nb::init<>())
      .def_rw("temperature", &SamplingParams::temperature)
      .def_rw("top_p", &SamplingParams::top_p)
      .def_rw("min_p", &SamplingParams::min_p)
      .def_rw("top_k", &SamplingParams::top_k)
      .def_rw("presence_penalty", &SamplingParams::presence_penalty)
      .def_rw("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_rw("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_rw("logit_bias", &SamplingParams::logit_bias)
      .def_rw("seed", &SamplingParams::seed)
      .def_rw("num_logprobs", &SamplingParams::num_logprobs)
      .def_rw("max_tokens", &SamplingParams::max_tokens)
      .def_rw("min_tokens", &SamplingParams::min_tokens)
      .def_rw("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_rw("allowed_token_ids", &SamplingParams::allowed_token_ids)
      .def_rw("bad_words", &SamplingParams::bad_words)
      .def_rw("logprob_token_ids", &SamplingParams::logprob_token_ids)
      .def_rw("num_prompt_logprobs", &SamplingParams::num_prompt_logprobs)
      .def_prop_rw(
          "repetition_detection",  // (max_pattern_size, min_pattern_size, min_count)
          [](const SamplingParams& p) {
            const RepetitionDetection& r = p.repetition_detection;
            return std::tuple(r.max_pattern_size, r.min_pattern_size, r.min_count);
          },
          [](SamplingParams& p, std::tuple<int32_t, int32_t, int32_t> r) {
            p.repetition_detection = {std::get<0>(r), std::get<1>(r), std::get<2>(r)};
          })
      .def_prop_rw(
          "pooling", [](const SamplingParams& p) { return kPoolings(p.pooling); },
          [](SamplingParams& p, const std::string& name) { p.pooling = kPoolings.parse("pooling", name); })
      .def_rw("priority", &SamplingParams::priority)
      .def_rw("cache_salt", &SamplingParams::cache_salt)
      .def_rw("constrained", &SamplingParams::constrained)
      .def_rw("eager", &SamplingParams::eager);

  nb::class_<Loading>(m, "Loading")
      .def(nb::init<>())
      .def_prop_ro("bytes_done", [](const Loading& l) { return l.bytes_done.load(); })
      .def_prop_ro("bytes_total", [](const Loading& l) { return l.bytes_total.load(); });

  nb::class_<Event>(m, "Event")
      .def_ro("request_id", &Event::request_id)
      .def_ro("tokens", &Event::tokens)
      .def_prop_ro("logprobs", [](const Event& e) { return logprob_tuples(e.logprobs); })
      .def_prop_ro("prompt_logprobs", [](const Event& e) { return logprob_tuples(e.prompt_logprobs); })
      .def_ro("embedding", &Event::embedding)
      .def_prop_ro("finish", [](const Event& e) { return kFinishes(e.finish); })
      .def_ro("error", &Event::error)
      .def_ro("num_cached_tokens", &Event::num_cached_tokens)
      .def_ro("scheduled_time", &Event::scheduled_time)
      .def_ro("time", &Event::time);

  nb::class_<Stats>(m, "Stats")
      .def_ro("num_running", &Stats::num_running)
      .def_ro("num_waiting", &Stats::num_waiting)
      .def_ro("num_blocks", &Stats::num_blocks)
      .def_ro("num_free_blocks", &Stats::num_free_blocks)
      .def_ro("num_steps", &Stats::num_steps)
      .def_ro("num_preemptions", &Stats::num_preemptions)
      .def_ro("prefix_cache_queries", &Stats::prefix_cache_queries)
      .def_ro("prefix_cache_hits", &Stats::prefix_cache_hits)
      .def_ro("prompt_tokens", &Stats::prompt_tokens)
      .def_ro("generation_tokens", &Stats::generation_tokens)
      .def_ro("step_tokens", &Stats::step_tokens)
      .def_ro("steps_by_size", &Stats::steps_by_size)
      .def_ro("block_size", &Stats::block_size)
      .def_ro("last_step_time", &Stats::last_step_time)
      .def_ro("alive", &Stats::alive)
      .def_ro("error", &Stats::error);
}

void bind_engine(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Engine>(m, "Engine")
      .def(nb::init<const ModelConfig&, const TensorIndex&, const EngineOptions&, Loading&>(),
           nb::arg("config"), nb::arg("tensors"), nb::arg("options"), nb::arg("loading"), Unlocked())
      .def(
          "submit",
          [](Engine& engine, uint64_t id, std::vector<int32_t> prompt, const SamplingParams& params) {
            engine.submit({id, std::move(prompt), params});
          },
          nb::arg("request_id"), nb::arg("prompt"), nb::arg("params"))
      .def("cancel", &Engine::cancel, nb::arg("request_id"))
      .def("forget_prefixes", &Engine::forget_prefixes)
      .def("fileno", &Engine::fileno)
      .def("drain", &Engine::drain)
      .def("stats", &Engine::stats)
      .def("wait_masks", &wait_masks, Unlocked())
      .def("answer_masks", &answer_masks, nb::arg("answers"))
      .def("stop", &Engine::stop, Unlocked())
      .def_prop_ro("options", &Engine::options)
      .def_prop_ro("weight_bytes", &Engine::weight_bytes)
      .def_prop_ro("device_name", &Engine::device_name);
}

}  // namespace

NB_MODULE(_engine, m) {
  // InputError is the user's to mend: ValueError in Python, as std::invalid_argument is already.
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const InputError& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  bind_config(m);
  bind_requests(m);
  bind_engine(m);
  m.def("dequantize", &dequantize, nb::arg("format"), nb::arg("data"), nb::arg("count"));
  m.def("read_strings", &read_strings, nb::arg("data"), nb::arg("position"), nb::arg("end"),
        nb::arg("count"));
  m.def("cuda_problem", &cuda_problem);
  m.attr("KV_BLOCK_SIZE") = kBlockSize;
  m.attr("__version__") = ENGINE_VERSION;
}
