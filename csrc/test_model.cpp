// Test-only module _model_test: the whole forward on hand-made batches, every logit of every token; and
// _engine's Engine with the CUDA device that the tests have, emulated where there is no GPU.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>

#include "base/check.h"
#include "cpu/cpu_device.h"
#include "cuda/cuda_device.h"
#include "cuda/make_cuda_device.h"
#include "engine/engine.h"
#include "model/weights.h"

namespace nb = nanobind;
using namespace engine;

void bind_cuda_machine(nb::module_& m);

namespace {

constexpr size_t kTestMemory = size_t{128} << 20;  // that a GPU gives to a model

struct Run {  // consecutive tokens of one sequence
  std::vector<int32_t> tokens;
  int32_t num_computed;
  std::vector<int32_t> blocks;
};

// Logits of every token of the runs, one after the other.
Batch batch_of(const std::vector<Run>& runs) {
  Batch batch;
  for (const Run& run : runs) {
    const auto blocks_needed = (run.num_computed + run.tokens.size() + kBlockSize - 1) / kBlockSize;
    check(run.blocks.size() == blocks_needed, "the block table covers the run");
    batch.sequences.push_back({batch.num_tokens(), static_cast<int32_t>(run.tokens.size()), run.num_computed,
                               static_cast<int32_t>(batch.block_tables.size())});
    batch.block_tables.insert(batch.block_tables.end(), run.blocks.begin(), run.blocks.end());
    for (size_t i = 0; i < run.tokens.size(); ++i) {
      batch.logit_rows.push_back(batch.num_tokens());
      batch.tokens.push_back(run.tokens[i]);
      batch.positions.push_back(run.num_computed + static_cast<int32_t>(i));
    }
  }
  return batch;
}

// A CPU that runs an MLP on so many rows at once, however many its caches hold, and counts them.
class PieceDevice : public CpuDevice {
 public:
  PieceDevice(int rows, int num_threads, Arithmetic arithmetic)
      : CpuDevice(select_kernels(), num_threads, arithmetic), rows_(rows) {}
  int rows_at_once(size_t /*row_bytes*/) const override { return rows_; }
  void activation(Activation kind, bool gated, const float* x, float* out, int n, int size) override {
    activated += n;
    CpuDevice::activation(kind, gated, x, out, n, size);
  }

  int64_t activated = 0;

 private:
  int rows_;
};

class Model {
 public:
  Model(const ModelConfig& config, const TensorIndex& tensors, const std::string& weight_format,
        const std::string& kv_format, int num_threads, int num_blocks, int max_tokens, bool exact,
        const std::string& device, int rows_at_once)
      : config_(config) {
    const Arithmetic arithmetic = exact ? Arithmetic::EXACT : Arithmetic::ROUNDED;
    if (rows_at_once > 0)
      device_ = std::make_unique<PieceDevice>(rows_at_once, num_threads, arithmetic);
    else
      device_ = make_device({.kind = device, .num_threads = num_threads, .arithmetic = arithmetic});
    device_->reserve(std::min(device_->memory_available(), kTestMemory));
    Loading loading;
    transformer_ =
        std::make_unique<Transformer>(config, load_weights(config, tensors, weight_format, *device_, loading),
                                      *device_, max_tokens, max_tokens);
    check(loading.bytes_done == loading.bytes_total, "loading ends at 100 %");
    transformer_->kv_alloc(kv_format == "F32"    ? Format::F32
                           : kv_format == "F16"  ? Format::F16
                           : kv_format == "BF16" ? Format::BF16
                                                 : Format::INT8,
                           num_blocks);
  }

  nb::ndarray<nb::numpy, float> forward(const std::vector<Run>& runs) {
    const Batch batch = batch_of(runs);
    const float* logits = transformer_->forward(batch);
    const size_t rows = batch.logit_rows.size(), cols = static_cast<size_t>(config_.vocab_size);
    auto* copy = new std::vector<float>(rows * cols);
    device_->copy_to_host(copy->data(), logits, copy->size());
    nb::capsule owner(copy, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
    return nb::ndarray<nb::numpy, float>(copy->data(), {rows, cols}, owner);
  }

  // Rows that went through an MLP, of all layers, where their pieces are given.
  int64_t rows_activated() const { return dynamic_cast<const PieceDevice&>(*device_).activated; }

  // How many steps were replays of a CUDA graph, and how many shapes of steps are remembered.
  std::pair<int64_t, size_t> graphs() const {
    const cuda::Graphs& graphs = dynamic_cast<const cuda::CudaDevice&>(*device_).graphs();
    return {graphs.replays(), graphs.size()};
  }

 private:
  ModelConfig config_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Transformer> transformer_;
};

}  // namespace

NB_MODULE(_model_test, m) {
  nb::module_::import_("langchain_vllm_server._engine");  // ModelConfig and TensorInfo are registered there
  nb::class_<Run>(m, "Run").def(
      "__init__",
      [](Run* self, std::vector<int32_t> tokens, int32_t num_computed, std::vector<int32_t> blocks) {
        new (self) Run{std::move(tokens), num_computed, std::move(blocks)};
      },
      nb::arg("tokens"), nb::arg("num_computed"), nb::arg("blocks"));
  nb::class_<Model>(m, "Model")
      .def(nb::init<const ModelConfig&, const TensorIndex&, const std::string&, const std::string&, int, int,
                    int, bool, const std::string&, int>(),
           nb::arg("config"), nb::arg("tensors"), nb::arg("weight_format") = "", nb::arg("kv_format") = "F32",
           nb::arg("num_threads") = 2, nb::arg("num_blocks") = 64, nb::arg("max_tokens") = 512,
           nb::arg("exact") = true, nb::arg("device") = "cpu", nb::arg("rows_at_once") = 0)
      .def("forward", &Model::forward, nb::arg("runs"))
      .def_prop_ro("rows_activated", &Model::rows_activated)
      .def_prop_ro("graphs", &Model::graphs);
  m.def(
      "Engine",
      [](const ModelConfig& config, const TensorIndex& tensors, const EngineOptions& options,
         Loading& loading) { return new Engine(config, tensors, options, loading); },
      nb::arg("config"), nb::arg("tensors"), nb::arg("options"), nb::arg("loading"),
      nb::rv_policy::take_ownership, nb::call_guard<nb::gil_scoped_release>());
  m.def("cuda_problem", &cuda_problem);
  bind_cuda_machine(m);
}
