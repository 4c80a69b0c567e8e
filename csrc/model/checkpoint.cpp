#include "model/checkpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/check.h"

namespace engine {

namespace {

// (rows, cols) of a tensor; a vector is one row.
std::pair<int64_t, int64_t> matrix_shape(const TensorInfo& info) {
  const size_t dimensions = info.shape.size();
  require(dimensions == 1 || dimensions == 2,
          "tensor " + info.name + " has " + std::to_string(dimensions) + " dimensions, expected 1 or 2");
  const int64_t rows = dimensions == 1 ? 1 : info.shape[0], cols = info.shape.back();
  constexpr int64_t kMost = int64_t{1}
                            << 40;  // far beyond any model; keeps products of these from overflowing
  require(rows > 0 && cols > 0 && rows < kMost / cols, "tensor " + info.name + " has an impossible shape");
  require(cols % block_size(info.format) == 0, "tensor " + info.name + ": " + std::to_string(cols) +
                                                   " columns do not fill whole " + format_name(info.format) +
                                                   " blocks of " + std::to_string(block_size(info.format)));
  return {rows, cols};
}

}  // namespace

int64_t stored_bytes(const TensorIndex& index) {
  int64_t total = 0;
  for (const auto& [role, tensors] : index)
    for (const TensorInfo& info : tensors) {
      const auto [rows, cols] = matrix_shape(info);
      total += rows * static_cast<int64_t>(row_bytes(info.format, cols));
    }
  return total;
}

MappedFile::MappedFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  require(fd >= 0, "cannot open " + path + ": " + std::strerror(errno));
  struct stat info{};
  const bool known = fstat(fd, &info) == 0 && info.st_size > 0;
  void* map =
      known ? mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
  const int error = errno;
  close(fd);
  require(known, path + " is empty or not a file");
  require(map != MAP_FAILED, "cannot map " + path + ": " + std::strerror(error));
  data_ = static_cast<const std::byte*>(map);
  size_ = static_cast<size_t>(info.st_size);
  // A hint only: the whole file is about to be read once, in order.
  madvise(map, size_, MADV_WILLNEED);
}

MappedFile::~MappedFile() {
  munmap(const_cast<std::byte*>(data_), size_);
}

std::vector<Tensor> Checkpoint::tensors(const std::string& role) {
  std::vector<Tensor> views;
  const auto found = index_.find(role);
  if (found == index_.end()) return views;
  for (const TensorInfo& info : found->second) views.push_back(view(info));
  return views;
}

Tensor Checkpoint::view(const TensorInfo& info) {
  const auto [rows, cols] = matrix_shape(info);
  auto& file = files_[info.file];
  if (!file) file = std::make_unique<MappedFile>(info.file);
  const size_t bytes = static_cast<size_t>(rows) * row_bytes(info.format, cols);
  require(info.offset <= file->size() && bytes <= file->size() - info.offset,
          "tensor " + info.name + " ends past the end of " + info.file + ": the file is truncated");
  return {info.name, info.format, rows, cols, file->data() + info.offset};
}

}  // namespace engine
