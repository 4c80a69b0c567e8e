// Reference-counted blocks of the key/value cache, found again by their contents. A freed block keeps its
// contents until it is reused: the prefix cache is whatever has not been overwritten yet. How much memory
// that may keep committed has a limit: beyond it, the oldest cached block is reused before one that was never
// used.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "device/batch.h"

namespace engine {

// Names the tokens from the start of a sequence to the end of one of its full blocks.
using PrefixId = uint64_t;
inline constexpr PrefixId kEmptyPrefix = 0;

// What a full block holds: the keys and values of kBlockSize tokens that follow a prefix. The table compares
// keys whole and an id is never given twice, so by induction an id stands for exactly one prefix. A chain of
// hashes would be as short, but a collision, by chance or crafted, would serve one prompt with another's keys
// and values and nobody would notice.
struct BlockKey {
  PrefixId prefix = kEmptyPrefix;
  std::array<int32_t, kBlockSize> tokens{};

  bool operator==(const BlockKey&) const = default;
};

struct BlockKeyHash {
  size_t operator()(const BlockKey& key) const;
};

class BlockPool {
 public:
  // max_cached: how many blocks may be in use or hold idle contents before those make room, rather than
  // blocks never used, for new ones. While more than that are in use, half as many idle ones stay beside
  // them.
  explicit BlockPool(int32_t num_blocks, int32_t max_cached = INT32_MAX);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  int32_t num_blocks() const { return static_cast<int32_t>(blocks_.size()); }
  int32_t num_free() const {
    return num_blocks() - num_used_ + static_cast<int32_t>(empty_.size()) + num_cached_;
  }
  bool is_free(int32_t block) const { return blocks_[block].references == 0; }

  // A block with one reference and no key; -1 when none is free. Takes one that was used and holds nothing of
  // use, then one never used, or the least recently used cached one, which is thereby evicted.
  int32_t allocate();
  // The block published under `key`, free or held; -1 when it is not cached. Takes no reference.
  int32_t find(const BlockKey& key) const;
  void acquire(int32_t block);  // one reference more
  void release(int32_t block);  // one reference less; the last one makes it the most recently used free block
  // Lets find() see a held block. A second block of the same contents stays private. Returns the id of the
  // prefix that ends with the block, the same for both.
  PrefixId publish(int32_t block, const BlockKey& key);
  PrefixId prefix(int32_t block) const { return blocks_[block].prefix; }  // of a published block
  // What the prefixes of one salt begin with; "" gives kEmptyPrefix. There is room for as many salts as there
  // are blocks; then all are forgotten, and with them what was cached under them.
  PrefixId root(const std::string& salt);
  void forget_cached();  // of the free blocks: what held ones share stays shared

  // Throws InvariantError unless references, free list and keys agree with each other and with `tables`, the
  // block tables of all live sequences. Linear in the pool.
  void check_integrity(const std::vector<const std::vector<int32_t>*>& tables) const;

 private:
  struct Block {
    int32_t references = 0;
    int32_t previous = -1, next = -1;  // neighbours among the cached free blocks
    const BlockKey* key = nullptr;     // in by_key_; null: private
    PrefixId prefix = kEmptyPrefix;    // what key stands for
  };

  int32_t take_free();
  void link(int32_t block);
  void unlink(int32_t block);
  void check_references(const std::vector<const std::vector<int32_t>*>& tables) const;
  void check_free_list() const;
  void check_keys() const;

  std::vector<Block> blocks_;                                   // (num_blocks)
  std::unordered_map<BlockKey, int32_t, BlockKeyHash> by_key_;  // contents → block, free ones included
  int32_t max_cached_;
  int32_t num_used_ = 0;        // blocks [num_used_, num_blocks) never were
  std::vector<int32_t> empty_;  // free, used before, without a key
  int32_t first_cached_ = -1, last_cached_ = -1, num_cached_ = 0;  // free with a key, in the order of reuse
  PrefixId last_prefix_ = kEmptyPrefix;
  std::unordered_map<std::string, PrefixId> roots_;
};

}  // namespace engine
