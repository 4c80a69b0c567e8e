#include "cuda/arena.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "base/check.h"
#include "cuda/runtime.h"

namespace engine::cuda {
namespace {

std::string mib(size_t bytes) {
  return std::to_string((bytes + (size_t{1} << 20) - 1) >> 20) + " MiB";
}

}  // namespace

Arena::~Arena() {
  cudaFree(base_);  // a lost device has freed it already
}

void Arena::reserve(size_t bytes) {
  check(!reserved(), "a GPU's memory is reserved once");
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation) cudaGetLastError();  // it is answered here
  require(
      error != cudaErrorMemoryAllocation,
      "out of GPU memory: " + mib(bytes) +
          " cannot be reserved: lower --memory or --gpu-memory-utilization, or end what else uses the GPU");
  cuda_check(error, "cudaMalloc");
  base_ = static_cast<std::byte*>(memory);
  bytes_ = bytes / kAlignment * kAlignment;
  free_ = {{0, bytes_}};
}

size_t Arena::available() const {
  size_t largest = 0;
  for (const auto& [_, bytes] : free_) largest = std::max(largest, bytes);
  return largest;
}

void* Arena::take(size_t bytes) {
  check(reserved(), "a GPU's memory is reserved before it is used");
  const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  const auto gap = std::ranges::find_if(free_, [&](const auto& g) { return g.second >= rounded; });
  require(gap != free_.end(),
          "out of GPU memory: a buffer takes " + mib(rounded) + ", but at most " + mib(available()) +
              " in one piece are left of the engine's " + mib(bytes_) +
              ": raise --memory or --gpu-memory-utilization, or lower --max-num-batched-tokens");
  const auto [start, size] = *gap;
  free_.erase(gap);
  if (size > rounded) free_[start + rounded] = size - rounded;
  used_[start] = rounded;
  cuda_check(cudaMemsetAsync(base_ + start, 0xff, rounded, nullptr), "cudaMemset");
  return base_ + start;
}

void Arena::give_back(void* piece) {
  if (piece == nullptr) return;
  const auto used = used_.find(static_cast<size_t>(static_cast<std::byte*>(piece) - base_));
  check(used != used_.end(), "a piece of a GPU's memory is given back where it was taken, once");
  auto gap = free_.insert(*used).first;
  used_.erase(used);
  ++returns_;
  if (const auto next = std::next(gap); next != free_.end() && gap->first + gap->second == next->first) {
    gap->second += next->second;
    free_.erase(next);
  }
  if (gap == free_.begin()) return;
  if (const auto before = std::prev(gap); before->first + before->second == gap->first) {
    before->second += gap->second;
    free_.erase(gap);
  }
}

}  // namespace engine::cuda
