// Memory for weights: many share one large region, so that the system can back them with huge pages. A
// model's weights are read from end to end for every token, and with pages of 4 KiB that costs as much in
// address translation as in memory (benchmarks/LOG.md).
#pragma once

#include <cstddef>
#include <memory>

namespace engine {

class Arena {
 public:
  // `bytes`, aligned to a cache line; their region lives as long as any of its parts. Throws InputError when
  // there is no memory.
  std::shared_ptr<std::byte> take(size_t bytes);

 private:
  std::shared_ptr<std::byte> region_;
  size_t size_ = 0, used_ = 0;
};

}  // namespace engine
