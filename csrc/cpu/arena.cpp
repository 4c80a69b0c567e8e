#include "cpu/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "base/check.h"

namespace engine {
namespace {

constexpr size_t kCacheLine = 64, kHugePage = size_t{2} << 20;
constexpr size_t kRegion = size_t{64} << 20;  // what is not used of it takes address space, not memory

size_t round_up(size_t bytes, size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

std::shared_ptr<std::byte> Arena::take(size_t bytes) {
  const size_t rounded = round_up(bytes, kCacheLine);
  if (used_ + rounded > size_) {
    size_ = round_up(std::max(rounded, kRegion), kHugePage);
    used_ = 0;
    void* memory = std::aligned_alloc(kHugePage, size_);
    require(memory != nullptr, "out of memory: weights take " + std::to_string(size_ >> 20) + " MiB more");
    madvise(memory, size_, MADV_HUGEPAGE);  // advice: it may fail
    region_.reset(static_cast<std::byte*>(memory), [](std::byte* region) { std::free(region); });
  }
  std::shared_ptr<std::byte> part(region_, region_.get() + used_);
  used_ += rounded;
  return part;
}

}  // namespace engine
