// Files of weights, mapped and read in place.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>

#include "base/tensor.h"
#include "model/transformer.h"

namespace engine {

// Bytes that the tensors of an index take in their files.
int64_t stored_bytes(const TensorIndex& index);

class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // InputError naming the path and the system's reason
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Every tensor of an index as a view of its mapped file; the views live as long as the checkpoint.
class Checkpoint {
 public:
  explicit Checkpoint(const TensorIndex& index) : index_(index) {}

  // The tensors that play `role`, none if the checkpoint has none. A vector counts as one row. Throws
  // InputError when a tensor does not lie inside its file or its shape does not suit its format.
  std::vector<Tensor> tensors(const std::string& role);

 private:
  Tensor view(const TensorInfo& info);

  const TensorIndex& index_;
  std::unordered_map<std::string, std::unique_ptr<MappedFile>> files_;
};

}  // namespace engine
