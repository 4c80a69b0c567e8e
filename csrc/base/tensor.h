// A tensor as it lies in a checkpoint: a view of mapped bytes, never owned, never copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/quant.h"

namespace engine {

struct Tensor {
  std::string name;        // as the checkpoint calls it, for error messages
  Format format;           // how a row of `cols` numbers is stored
  int64_t rows;            // output channels; 1 for a vector
  int64_t cols;            // input channels; a multiple of block_size(format)
  const std::byte* data;   // (rows, row_bytes(format, cols)), row-major; not necessarily aligned
  Format target = format;  // what Device::pack makes of it; another format for plain floats only
};

}  // namespace engine
