#include "device/batch.h"

#include <algorithm>

#include "base/check.h"

namespace engine {

int32_t check_tables(const Batch& batch) {
  check(batch.positions.size() == batch.tokens.size(), "batch: one position per token");
  int32_t next = 0;
  for (const BatchSequence& s : batch.sequences) {
    check(s.first_token == next && s.num_tokens > 0, "batch: sequences cover the tokens in order");
    next += s.num_tokens;
    const int32_t num_blocks = (s.num_computed + s.num_tokens + kBlockSize - 1) / kBlockSize;
    const size_t end = static_cast<size_t>(s.first_block) + static_cast<size_t>(num_blocks);
    check(s.first_block >= 0 && end <= batch.block_tables.size(), "batch: block tables hold every token");
  }
  check(next == batch.num_tokens(), "batch: sequences cover the tokens");
  int32_t largest = -1;
  for (const int32_t block : batch.block_tables) {
    check(block >= 0, "batch: block tables name blocks of the cache");
    largest = std::max(largest, block);
  }
  return largest;
}

}  // namespace engine
