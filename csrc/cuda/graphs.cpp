#include "cuda/graphs.h"

#include <algorithm>

#include "base/check.h"
#include "cuda/runtime.h"

namespace engine::cuda {
namespace {

// From its begin on, a stream records what it would run; whatever ends that, it runs again.
class Capture {
 public:
  explicit Capture(cudaStream_t stream) : stream_(stream) {
    cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  ~Capture() {
    if (!ended_) cudaStreamEndCapture(stream_, &graph_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }
  cudaGraphExec_t end() {
    ended_ = true;
    cuda_check(cudaStreamEndCapture(stream_, &graph_), "cudaStreamEndCapture");
    cudaGraphExec_t executable = nullptr;
    cuda_check(cudaGraphInstantiate(&executable, graph_, 0), "cudaGraphInstantiate");
    return executable;
  }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  bool ended_ = false;
};

}  // namespace

void Graphs::run(cudaStream_t stream, const StepShape& shape, const std::function<void()>& launch) {
  forget_moved();
  const auto found = std::ranges::find(steps_, shape, &Step::shape);
  if (found == steps_.end()) {
    launch();
    forget_moved();
    steps_.push_front({shape, nullptr});
    if (steps_.size() > kMost) steps_.pop_back();
    return;
  }
  steps_.splice(steps_.begin(), steps_, found);
  if (!found->graph) {
    Capture capture(stream);
    launch();
    found->graph.reset(capture.end());
    check(returns_ == arena_.returns(), "what a step needs lies where it was when its shape was first seen");
  }
  cuda_check(cudaGraphLaunch(found->graph.get(), stream), "cudaGraphLaunch");
  ++replays_;
}

void Graphs::forget_moved() {
  if (returns_ == arena_.returns()) return;
  steps_.clear();
  returns_ = arena_.returns();
}

}  // namespace engine::cuda
