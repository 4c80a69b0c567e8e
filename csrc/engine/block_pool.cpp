#include "engine/block_pool.h"

#include "base/check.h"
#include "base/random.h"

namespace engine {

// Spreads keys over buckets, no more: equality decides.
size_t BlockKeyHash::operator()(const BlockKey& key) const {
  uint64_t hash = mix64(key.prefix);
  for (int32_t token : key.tokens) hash = (hash ^ static_cast<uint32_t>(token)) * 0x9e3779b97f4a7c15ULL;
  return mix64(hash);
}

BlockPool::BlockPool(int32_t num_blocks, int32_t max_cached) : blocks_(num_blocks), max_cached_(max_cached) {
  by_key_.reserve(num_blocks);
}

int32_t BlockPool::take_free() {
  if (!empty_.empty()) {
    const int32_t id = empty_.back();
    empty_.pop_back();
    return id;
  }
  const bool any_unused = num_used_ < num_blocks();
  if (any_unused && (num_used_ < max_cached_ || num_cached_ <= max_cached_ / 2)) return num_used_++;
  const int32_t id = first_cached_;
  if (id >= 0) unlink(id);
  return id;
}

int32_t BlockPool::allocate() {
  const int32_t id = take_free();
  if (id < 0) return -1;
  Block& block = blocks_[id];
  if (block.key) by_key_.erase(by_key_.find(*block.key));
  block.key = nullptr;
  block.references = 1;
  return id;
}

int32_t BlockPool::find(const BlockKey& key) const {
  const auto entry = by_key_.find(key);
  return entry == by_key_.end() ? -1 : entry->second;
}

void BlockPool::acquire(int32_t block) {
  if (blocks_[block].references++ == 0) unlink(block);
}

void BlockPool::release(int32_t block) {
  check(blocks_[block].references > 0, "a free block is released");
  if (--blocks_[block].references > 0) return;
  blocks_[block].key ? link(block) : empty_.push_back(block);
}

PrefixId BlockPool::publish(int32_t block, const BlockKey& key) {
  check(blocks_[block].references > 0 && !blocks_[block].key, "only a held, private block can be published");
  const auto [entry, inserted] = by_key_.try_emplace(key, block);
  if (inserted) {
    blocks_[block].key = &entry->first;
    blocks_[block].prefix = ++last_prefix_;
  }
  return blocks_[entry->second].prefix;
}

PrefixId BlockPool::root(const std::string& salt) {
  if (salt.empty()) return kEmptyPrefix;
  if (roots_.size() >= blocks_.size() && !roots_.contains(salt)) roots_.clear();
  PrefixId& root = roots_[salt];
  if (root == kEmptyPrefix) root = ++last_prefix_;
  return root;
}

void BlockPool::forget_cached() {
  while (first_cached_ >= 0) {
    const int32_t id = first_cached_;
    unlink(id);
    by_key_.erase(by_key_.find(*blocks_[id].key));
    blocks_[id].key = nullptr;
    empty_.push_back(id);
  }
}

void BlockPool::link(int32_t id) {
  Block& block = blocks_[id];
  block.previous = last_cached_;
  (last_cached_ < 0 ? first_cached_ : blocks_[last_cached_].next) = id;
  last_cached_ = id;
  ++num_cached_;
}

void BlockPool::unlink(int32_t id) {
  Block& block = blocks_[id];
  (block.previous < 0 ? first_cached_ : blocks_[block.previous].next) = block.next;
  (block.next < 0 ? last_cached_ : blocks_[block.next].previous) = block.previous;
  block.previous = block.next = -1;
  --num_cached_;
}

void BlockPool::check_integrity(const std::vector<const std::vector<int32_t>*>& tables) const {
  check_references(tables);
  check_free_list();
  check_keys();
}

void BlockPool::check_references(const std::vector<const std::vector<int32_t>*>& tables) const {
  std::vector<int32_t> references(blocks_.size());
  std::vector<size_t> last_table(blocks_.size());
  for (size_t table = 0; table < tables.size(); ++table) {
    for (int32_t block : *tables[table]) {
      check(block >= 0 && block < num_blocks(), "a block table names a block outside the pool");
      check(last_table[block] != table + 1, "a block table names a block twice");
      last_table[block] = table + 1;
      ++references[block];
    }
  }
  for (size_t i = 0; i < blocks_.size(); ++i) {
    check(blocks_[i].references == references[i], "a reference count differs from the block tables");
    check(references[i] <= 1 || blocks_[i].key, "a private block is shared");
  }
}

void BlockPool::check_free_list() const {
  int32_t previous = -1, count = 0;
  for (int32_t id = first_cached_; id >= 0; previous = id, id = blocks_[id].next) {
    check(++count <= num_cached_, "the free list is longer than its count");
    check(blocks_[id].references == 0 && blocks_[id].key,
          "a held or private block is among the cached free ones");
    check(blocks_[id].previous == previous, "the free list's links disagree");
  }
  check(previous == last_cached_ && count == num_cached_, "the free list is broken");
  for (int32_t id : empty_)
    check(id < num_used_ && blocks_[id].references == 0 && !blocks_[id].key,
          "an empty block is held or cached");
  for (int32_t id = num_used_; id < num_blocks(); ++id)
    check(blocks_[id].references == 0 && !blocks_[id].key, "a block that was never used is held or cached");
  int32_t unreferenced = 0;
  for (const Block& block : blocks_) unreferenced += block.references == 0;
  check(unreferenced == num_free(), "a free block is lost");
}

void BlockPool::check_keys() const {
  size_t published = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Block& block = blocks_[i];
    if (!block.key) continue;
    ++published;
    check(find(*block.key) == static_cast<int32_t>(i), "a key leads to another block");
    check(block.key->prefix < block.prefix, "a prefix is older than what it extends");
  }
  check(published == by_key_.size(), "a key leads to a private block");
}

}  // namespace engine
