// A GPU's memory, as one device of the engine has it: taken from CUDA once, handed out in pieces. Pieces that
// are given back are used again, and nobody else can take what the engine has counted on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

namespace engine::cuda {

class Arena {
 public:
  static constexpr size_t kAlignment = 256;          // of pieces, as cudaMalloc() has it
  static constexpr size_t kLost = kAlignment << 12;  // to the alignment of a model's pieces, at most

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // Takes `bytes` from CUDA. Once, before take().
  void reserve(size_t bytes);
  bool reserved() const { return base_ != nullptr; }
  // The largest piece that can be had.
  size_t available() const;
  // A piece full of NaNs: what nobody has written shows. Throws InputError when there is none so large.
  void* take(size_t bytes);
  void give_back(void* piece);
  // How often a piece was given back: addresses that somebody remembers may be another's since.
  uint64_t returns() const { return returns_; }

 private:
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
  std::map<size_t, size_t> free_;  // where each gap starts → its bytes
  std::map<size_t, size_t> used_;  // likewise each piece
  uint64_t returns_ = 0;
};

}  // namespace engine::cuda
