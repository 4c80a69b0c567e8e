// How weights lie in a GPU's memory: as the matrix instructions want them, so that a warp's loads are wide
// and contiguous and nothing passes through shared memory.
//
// A panel is 16 rows, a step is 32 columns, and a tile is where they meet. With g = lane / 4 and t = lane % 4
// a lane has 16 weights of each tile: e = 8 upper + 4 half + i stands for row g + 8 upper and column 16 half
// + 4t + i. (A matrix instruction takes columns in another order; as the activations are laid out alike, the
// sum is the same.) Rows and columns that fill up the last tiles are zeros.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "base/quant.h"
#include "cuda/runtime.h"
#include "device/device.h"

namespace engine::cuda {

inline constexpr int kPanelRows = 16;
inline constexpr int kStepCols = 32;
inline constexpr int kLaneWeights = 16;
// Steps whose products are summed up by themselves; the sums of slices are added in ascending order. So who
// computes which slice changes no bit. As many columns as the largest block has.
inline constexpr int kSliceSteps = 8;

// Bytes of each part of the packed form of a format.
struct PackedSizes {
  int lane;   // a lane's quants (low four bits, or all eight) or plain floats in a tile
  int extra;  // a lane's fifth bits (uint16: bit e), or fifth and sixth (byte i: bits 2 (2 upper + half))
  int scale;  // a row's scales in a tile: f16; f16 and f16 offset; two bytes
  int super;  // a row's scales of a slice: f16 d and dmin
  int row;    // a row's scale: f32
};
PackedSizes packed_sizes(Format format);

struct PackedSegment {  // the rows of sources that follow each other in one format
  Format format;
  Arithmetic arithmetic;  // EXACT for plain floats
  int64_t first_row = 0, rows = 0;
  int64_t panels = 0;
  size_t lanes, extras, scales, supers, row_scales;  // where each part starts in `memory`; multiples of 128
};

class CudaWeight : public Weight {
 public:
  explicit CudaWeight(Arena& arena) : memory(arena) {}
  size_t bytes() const override { return memory.bytes(); }
  int64_t steps() const { return (cols + kStepCols - 1) / kStepCols; }

  std::vector<PackedSegment> segments;
  size_t bias = 0;  // where it starts in `memory`
  bool has_bias = false;
  DeviceMemory memory;
};

std::unique_ptr<CudaWeight> pack_for_cuda(Arena& arena, std::span<const Tensor> sources,
                                          std::span<const float> bias, Arithmetic arithmetic,
                                          cudaStream_t stream);

}  // namespace engine::cuda
