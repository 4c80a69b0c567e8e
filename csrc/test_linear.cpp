// Storage formats and the linear kernels, for the tests and benchmarks/kernels.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <map>
#include <random>

#include "base/check.h"
#include "base/quant.h"
#include "cpu/linear.h"
#include "cpu/peak.h"
#include "cuda/peak.h"
#include "test_device.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace engine {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Source = std::tuple<std::string, int64_t, int64_t, Bytes>;  // format, rows, cols, data

Format format_named(const std::string& name) {
  for (int i = 0; i < kNumFormats; ++i) {
    if (name == format_name(static_cast<Format>(i))) return static_cast<Format>(i);
  }
  throw InputError("no format is called " + name);
}

template <class T>
nb::ndarray<nb::numpy, T> array(std::vector<T> values, std::vector<size_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return {owned->data(), shape.size(), shape.data(), owner};
}

auto dequantize(const std::string& name, Bytes data, int64_t cols) {
  const Format format = format_named(name);
  const size_t bytes = row_bytes(format, cols), rows = data.size() / bytes;
  check(rows * bytes == data.size(), "data is not a whole number of rows");
  std::vector<float> out(rows * static_cast<size_t>(cols));
  for (size_t r = 0; r < rows; ++r) dequantize_row(format, data.data() + r * bytes, &out[r * cols], cols);
  return array(std::move(out), {rows, static_cast<size_t>(cols)});
}

auto quantize(const std::string& name, Vector values) {
  const Format format = format_named(name);
  const size_t bytes = row_bytes(format, static_cast<int64_t>(values.size()));
  std::vector<uint8_t> out(bytes);
  quantize_row(format, values.data(), out.data(), static_cast<int64_t>(values.size()));
  return array(std::move(out), {bytes});
}

// (groups, kRowTile, 32): what is made of at most kRowTile rows, in memory that was all ones.
auto round_to_bf16(const std::string& isa, Matrix x) {
  check(x.shape(0) <= kRowTile, "more rows than a tile has");
  std::vector<Bf16Tile> tiles((x.shape(1) + 31) / 32);
  std::memset(tiles.data(), 0xff, tiles.size() * sizeof(Bf16Tile));
  kernels_named(isa).linear->round_to_bf16(x.data(), static_cast<int64_t>(x.shape(1)),
                                           static_cast<int>(x.shape(0)), tiles.data());
  std::vector<uint16_t> out(tiles.size() * kRowTile * 32);
  std::memcpy(out.data(), tiles.data(), tiles.size() * sizeof(Bf16Tile));
  return array(std::move(out), {tiles.size(), kRowTile, 32});
}

// A packed weight with the device that multiplies it.
class Linear {
 public:
  Linear(const std::string& isa, int threads, const std::vector<Source>& sources,
         const std::vector<float>& bias, bool exact, const std::string& target)
      : device_(make_test_device(isa, threads, exact ? Arithmetic::EXACT : Arithmetic::ROUNDED)) {
    std::vector<Tensor> tensors;
    for (const auto& [format, rows, cols, data] : sources) {
      tensors.push_back(
          {"", format_named(format), rows, cols, reinterpret_cast<const std::byte*>(data.data())});
      if (!target.empty()) tensors.back().target = format_named(target);
      check(data.size() == static_cast<size_t>(rows) * row_bytes(tensors.back().format, cols),
            "wrong data size");
    }
    weight_ = device_->pack(tensors, bias);
  }

  size_t bytes() const { return weight_->bytes(); }

  // What stands behind y must not be touched.
  auto multiply(Matrix x) {
    const size_t n = x.shape(0), rows = static_cast<size_t>(weight_->rows);
    check(x.shape(1) == static_cast<size_t>(weight_->cols), "x has other columns than the weight");
    constexpr float guard = 12345.0f;
    std::vector<float> y(n * rows + kLanes, guard);
    const auto in = device_->upload({x.data(), x.size()}), result = device_->upload(y);
    device_->linear(*weight_, in->data, result->data, static_cast<int>(n));
    device_->copy_to_host(y.data(), result->data, y.size());
    for (size_t i = n * rows; i < y.size(); ++i) check(y[i] == guard, "linear wrote behind y");
    return array(std::move(y), {n, rows});
  }

  auto embed_tokens(const std::vector<int32_t>& tokens) {
    const auto cols = static_cast<size_t>(weight_->cols);
    std::vector<float> out(tokens.size() * cols);
    const auto rows = device_->alloc(out.size());
    device_->embed(*weight_, tokens, rows->data);
    device_->copy_to_host(out.data(), rows->data, out.size());
    return array(std::move(out), {tokens.size(), cols});
  }

 protected:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Weight> weight_;
};

// The matrices of some experts, and a Routing.
class Experts : public Linear {
 public:
  Experts(const std::string& isa, int threads, int num_experts, int per_token, bool norm_topk_prob,
          const std::vector<Source>& sources, bool exact, const std::string& target, int max_tokens)
      : Linear(isa, threads, sources, {}, exact, target) {
    config_.num_experts = num_experts;
    config_.num_experts_per_tok = per_token;
    config_.norm_topk_prob = norm_topk_prob;
    routing_ = device_->routing_alloc(config_, max_tokens);
  }

  void route(Matrix scores) {
    n_ = scores.shape(0);
    check(scores.shape(1) == static_cast<size_t>(config_.num_experts), "a score for each expert");
    const auto in = device_->upload({scores.data(), scores.size()});
    device_->route(config_, in->data, static_cast<int>(n_), *routing_);
  }

  auto dispatch(Matrix x) {
    check(x.shape(0) == n_, "as many rows as were routed");
    return run(x, num_choices(), x.shape(1), [&](const float* in, float* out) {
      device_->dispatch(*routing_, in, out, static_cast<int>(x.shape(1)));
    });
  }

  auto multiply(Matrix x) {
    check(x.shape(0) == num_choices() && x.shape(1) == static_cast<size_t>(weight_->cols),
          "a row for each choice");
    const auto rows = static_cast<size_t>(weight_->rows / config_.num_experts);
    return run(x, num_choices(), rows,
               [&](const float* in, float* out) { device_->linear_experts(*weight_, *routing_, in, out); });
  }

  auto combine(Matrix y) {
    check(y.shape(0) == num_choices(), "a row for each choice");
    return run(y, n_, y.shape(1), [&](const float* in, float* out) {
      device_->combine(*routing_, in, out, static_cast<int>(y.shape(1)));
    });
  }

 private:
  size_t num_choices() const { return n_ * static_cast<size_t>(config_.num_experts_per_tok); }

  // What op(in, out) makes of x: (rows, cols). What stands behind it must not be touched.
  template <class Op>
  nb::ndarray<nb::numpy, float> run(Matrix x, size_t rows, size_t cols, Op&& op) {
    constexpr float guard = 12345.0f;
    std::vector<float> out(rows * cols + kLanes, guard);
    const auto in = device_->upload({x.data(), x.size()}), result = device_->upload(out);
    op(in->data, result->data);
    device_->copy_to_host(out.data(), result->data, out.size());
    for (size_t i = rows * cols; i < out.size(); ++i) check(out[i] == guard, "an op wrote behind its result");
    return array(std::move(out), {rows, cols});
  }

  ModelConfig config_;
  std::unique_ptr<Routing> routing_;
  size_t n_ = 0;
};

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Any quants, and scales or plain floats that are normal numbers below 1: subnormal ones would be slow.
std::vector<std::byte> random_rows(Format format, int64_t rows, int64_t cols) {
  std::vector<std::byte> data(static_cast<size_t>(rows) * row_bytes(format, cols));
  std::minstd_rand random(1);
  for (std::byte& b : data) b = static_cast<std::byte>(0x20 | ((random() >> 8) & 0x1f));
  return data;
}

// (GMAC/s, GB/s of weights) over as many copies of the weight as no cache holds, as the layers of a model
// are.
std::pair<double, double> bench_linear(const std::string& isa, const std::string& format, int64_t rows,
                                       int64_t cols, int n, int threads, double seconds, bool exact) {
  constexpr size_t kUncached = size_t{96} << 20;
  ThreadPool pool(threads);
  Arena arena;
  const Kernels& kernels = kernels_named(isa);
  const Format packed = format_named(format), stored = packed == Format::INT8 ? Format::F32 : packed;
  const std::vector<std::byte> data = random_rows(stored, rows, cols);
  const Tensor source{"", stored, rows, cols, data.data(), packed};
  std::vector<std::unique_ptr<Weight>> weights;
  for (size_t i = 0; i <= kUncached / (static_cast<size_t>(rows) * row_bytes(packed, cols)); ++i)
    weights.push_back(
        pack_weight(kernels, pool, arena, {&source, 1}, {}, exact ? Arithmetic::EXACT : Arithmetic::ROUNDED));
  std::vector<float> x(static_cast<size_t>(n * cols), 1.0f), y(static_cast<size_t>(n * rows));
  RoundedRows scratch;
  int calls = 0;
  const auto start = Clock::now();
  while (seconds_since(start) < seconds) {
    linear(kernels, pool, *weights[static_cast<size_t>(calls++) % weights.size()], x.data(), y.data(), n,
           scratch);
  }
  const double per_second = calls / seconds_since(start);
  return {per_second * static_cast<double>(rows * cols * n) * 1e-9,
          per_second * static_cast<double>(weights[0]->bytes()) * 1e-9};
}

// The most that `threads` cores do at once: GMAC/s of integer dot products and of f32, GB/s read from memory.
// The best of several tries each, for the machine is not alone.
std::map<std::string, double> bench_peaks(const std::string& isa, int threads) {
  constexpr int64_t kRounds = 2'000'000;
  constexpr size_t kBytes = size_t{192} << 20;
  const PeakKernels& peak = *kernels_named(isa).peak;
  ThreadPool pool(threads);
  const auto best_rate = [&](double work, auto&& task) {
    double best = 0;
    for (int i = 0; i < 20; ++i) {
      const auto start = Clock::now();
      pool.run(threads, task);
      best = std::max(best, work * threads / seconds_since(start));
    }
    return best * 1e-9;
  };
  std::vector<Arena> arenas(static_cast<size_t>(threads));
  std::vector<std::shared_ptr<std::byte>> data;
  for (Arena& arena : arenas) std::memset(data.emplace_back(arena.take(kBytes)).get(), 1, kBytes);
  return {{"dot_gmacs", best_rate(4.0 * kPeakOps * kRounds, [&](int, int) { peak.dot(kRounds); })},
          {"fma_gmacs", best_rate(1.0 * kPeakOps * kRounds, [&](int, int) { peak.fma(kRounds); })},
          {"read_gbs",
           best_rate(kBytes, [&](int i, int) { peak.read(data[static_cast<size_t>(i)].get(), kBytes); })}};
}

// Likewise of the GPU; emulated, it says nothing.
std::map<std::string, double> bench_cuda_peaks(size_t bytes, int rounds) {
  const cuda::Peaks peaks = cuda::measure_peaks(bytes, rounds);
  return {{"read_gbs", peaks.read_gbs}, {"bf16_gmacs", peaks.bf16_gmacs}, {"dot_gmacs", peaks.dot_gmacs}};
}

}  // namespace
}  // namespace engine

void bind_linear(nb::module_& m) {
  using namespace engine;
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported_kernels()) names.emplace_back(kernels->name);
    return names;
  });
  m.def("selected_isa", [] { return std::string(select_kernels().name); });
  m.def("formats", [] {
    std::vector<std::tuple<std::string, int, size_t>> formats;
    for (int i = 0; i < kNumStoredFormats; ++i) {
      const auto format = static_cast<Format>(i);
      formats.emplace_back(format_name(format), block_size(format), block_bytes(format));
    }
    return formats;
  });
  m.def("dequantize", &dequantize, "format"_a, "data"_a, "cols"_a);
  m.def("quantize", &quantize, "format"_a, "values"_a);
  m.def("round_to_bf16", &round_to_bf16, "isa"_a, "x"_a);
  m.def("bench_linear", &bench_linear, "isa"_a, "format"_a, "rows"_a, "cols"_a, "n"_a, "threads"_a,
        "seconds"_a, "exact"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("bench_peaks", &bench_peaks, "isa"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("bench_cuda_peaks", &bench_cuda_peaks, "bytes"_a = size_t{1} << 30, "rounds"_a = 20'000,
        nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Linear>(m, "Linear")
      .def(nb::init<const std::string&, int, const std::vector<Source>&, const std::vector<float>&, bool,
                    const std::string&>(),
           "isa"_a, "threads"_a, "sources"_a, "bias"_a = std::vector<float>(), "exact"_a = true,
           "target"_a = "")
      .def_prop_ro("bytes", &Linear::bytes)
      .def("multiply", &Linear::multiply, "x"_a)
      .def("embed", &Linear::embed_tokens, "tokens"_a);
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<const std::string&, int, int, int, bool, const std::vector<Source>&, bool,
                    const std::string&, int>(),
           "isa"_a, "threads"_a, "num_experts"_a, "per_token"_a, "norm_topk_prob"_a, "sources"_a,
           "exact"_a = true, "target"_a = "", "max_tokens"_a = 64)
      .def("route", &Experts::route, "scores"_a)
      .def("dispatch", &Experts::dispatch, "x"_a)
      .def("multiply", &Experts::multiply, "x"_a)
      .def("combine", &Experts::combine, "y"_a);
}
