// Graphs of launches, for tests/kernels/test_cuda_on_cpu.py: what is recorded, replayed and forgotten.
#include <cuda_runtime.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/common.cuh"
#include "cuda/graphs.h"
#include "cuda/runtime.h"

namespace nb = nanobind;
using namespace engine;
using namespace engine::cuda;

namespace {

__global__ void sum_kernel(int argument, View<const int> in_memory, View<int> sum) {
  if (threadIdx.x == 0) sum[0] += argument + in_memory[0];
}

class GraphsFixture {
 public:
  GraphsFixture() {
    arena_.reserve(size_t{1} << 20);
    cuda_check(cudaStreamCreate(&stream_), "cudaStreamCreate");
  }
  ~GraphsFixture() { cudaStreamDestroy(stream_); }

  // Adds both numbers to the sum with a launch of this shape, which does what a capture forbids as well.
  void add(const std::vector<int64_t>& shape, int argument, int in_memory, const std::string& besides) {
    in_memory_ = in_memory;
    graphs_.run(stream_, shape, [&] {
      ++launches_;
      launch(stream_, 1, kWarpSize, sum_kernel, argument, View<const int>(&in_memory_, 1),
             View<int>(&sum_, 1));
      if (besides == "malloc") cuda_check(cudaMalloc(&forbidden_, 1), "cudaMalloc");
      if (besides == "synchronize") cuda_check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
      if (besides == "another stream") cuda_check(cudaMemsetAsync(&sum_, 0, 0, nullptr), "cudaMemset");
      if (besides == "unchecked") cudaStreamSynchronize(stream_);
    });
  }
  void move_memory() { arena_.give_back(arena_.take(1)); }
  // The sum, how often something was launched, how often replayed, and how many shapes are remembered.
  std::tuple<int, int, int64_t, size_t> state() const {
    return {sum_, launches_, graphs_.replays(), graphs_.size()};
  }

 private:
  Arena arena_;
  cudaStream_t stream_ = nullptr;
  Graphs graphs_{arena_};
  int sum_ = 0, in_memory_ = 0, launches_ = 0;
  void* forbidden_ = nullptr;
};

}  // namespace

void bind_cuda_graphs(nb::module_& m) {
  m.attr("most_cuda_graphs") = Graphs::kMost;
  nb::class_<GraphsFixture>(m, "CudaGraphs")
      .def(nb::init<>())
      .def("add", &GraphsFixture::add, nb::arg("shape"), nb::arg("argument"), nb::arg("in_memory"),
           nb::arg("besides") = "")
      .def("move_memory", &GraphsFixture::move_memory)
      .def_prop_ro("state", &GraphsFixture::state);
}
