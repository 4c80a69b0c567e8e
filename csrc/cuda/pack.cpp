#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "base/blocks.h"
#include "base/check.h"
#include "cuda/packed_weight.h"

namespace engine::cuda {
namespace {

constexpr size_t kPartAlignment = 128;  // a line of the L1 cache
constexpr int kLanes = 32;

size_t aligned(size_t bytes) {
  return (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
}

struct Place {  // of a row's 32 columns of a step
  int lane, e;  // of column `i`, see packed_weight.h
};

Place place(int row, int col) {
  return {row % 8 * 4 + col % 16 / 4, row / 8 * 8 + col / 16 * 4 + col % 4};
}

// Writes rows of one segment into its parts.
class Packer {
 public:
  Packer(const PackedSegment& segment, int64_t steps, std::byte* memory)
      : segment_(segment), sizes_(packed_sizes(segment.format)), steps_(steps), memory_(memory) {}

  void row(int64_t row, const std::byte* data, int64_t cols) {
    if (is_plain(segment_.format)) return plain(row, data, cols);
    if (segment_.format == Format::INT8) {
      std::memcpy(memory_ + segment_.row_scales + static_cast<size_t>(row) * sizeof(float), data,
                  sizeof(float));
      data += sizeof(float);
    }
    visit_block(segment_.format, [&]<class Block>(Block) {
      using Layout = BlockLayout<Block>;
      for (int64_t b = 0; b < cols / Layout::kCols; ++b) {
        Block block;
        std::memcpy(&block, data + static_cast<size_t>(b) * sizeof block, sizeof block);
        for (int s = 0; s < Layout::kCols / kStepCols; ++s)
          step(row, b * (Layout::kCols / kStepCols) + s, s, block);
      }
    });
  }

 private:
  size_t tile(int64_t row, int64_t step) const {
    return static_cast<size_t>(row / kPanelRows * steps_ + step);
  }

  // In chunks of 16 bytes of each lane, for loads of 512 contiguous bytes.
  void plain(int64_t row, const std::byte* data, int64_t cols) {
    const size_t size = block_bytes(segment_.format), per_chunk = 16 / size;
    for (int64_t col = 0; col < cols; ++col) {
      const Place p = place(static_cast<int>(row % kPanelRows), static_cast<int>(col % kStepCols));
      const auto e = static_cast<size_t>(p.e), lane = static_cast<size_t>(p.lane);
      const size_t chunk = tile(row, col / kStepCols) * (kLaneWeights / per_chunk) + e / per_chunk;
      std::memcpy(memory_ + segment_.lanes + (chunk * kLanes + lane) * 16 + e % per_chunk * size,
                  data + static_cast<size_t>(col) * size, size);
    }
  }

  template <class Block>
  void step(int64_t row, int64_t step, int step_of_block, const Block& block) {
    using Layout = BlockLayout<Block>;
    uint8_t q[kStepCols];
    constexpr int groups = kStepCols / Layout::kGroup;
    for (int g = 0; g < groups; ++g)
      Layout::quants(block, groups * step_of_block + g, q + g * Layout::kGroup);
    const size_t t = tile(row, step);
    for (int col = 0; col < kStepCols; ++col)
      quant(t, place(static_cast<int>(row % kPanelRows), col), q[col]);
    const size_t in_tile = t * kPanelRows + static_cast<size_t>(row % kPanelRows);
    const size_t slices = static_cast<size_t>((steps_ + kSliceSteps - 1) / kSliceSteps);
    const size_t in_slice =
        (static_cast<size_t>(row / kPanelRows) * slices + static_cast<size_t>(step / kSliceSteps)) *
            kPanelRows +
        static_cast<size_t>(row % kPanelRows);
    scales(block, step_of_block, memory_ + segment_.scales + in_tile * static_cast<size_t>(sizes_.scale),
           memory_ + segment_.supers + in_slice * static_cast<size_t>(sizes_.super));
  }

  void quant(size_t tile, Place p, uint8_t q) {
    const size_t lane = tile * kLanes + static_cast<size_t>(p.lane);
    const auto e = static_cast<size_t>(p.e);
    auto* low =
        reinterpret_cast<uint8_t*>(memory_ + segment_.lanes + lane * static_cast<size_t>(sizes_.lane));
    auto* high =
        reinterpret_cast<uint8_t*>(memory_ + segment_.extras + lane * static_cast<size_t>(sizes_.extra));
    if (sizes_.lane == kLaneWeights) {
      low[e] = q;
      return;
    }
    low[e / 8 * 4 + e % 4] |= static_cast<uint8_t>((q & 15) << (e / 4 % 2 * 4));
    if (sizes_.extra == 2) high[e / 8] |= static_cast<uint8_t>((q >> 4) << (e % 8));
    if (sizes_.extra == 4) high[e % 4] |= static_cast<uint8_t>((q >> 4) << (e / 4 * 2));
  }

  template <class Block>
  static void scales(const Block& block, int step, std::byte* scale, std::byte* super) {
    if constexpr (requires { block.dmin; }) {
      const uint8_t bytes[2] = {six_bits(block.scales, 0, step), six_bits(block.scales, 1, step)};
      const uint16_t both[2] = {block.d, block.dmin};
      std::memcpy(scale, bytes, sizeof bytes);
      std::memcpy(super, both, sizeof both);
    } else if constexpr (requires { block.scales; }) {
      std::memcpy(scale, block.scales + 2 * step, 2);
      std::memcpy(super, &block.d, sizeof block.d);
    } else if constexpr (requires { block.m; }) {
      const uint16_t both[2] = {block.d, block.m};
      std::memcpy(scale, both, sizeof both);
    } else if constexpr (requires { block.d; }) {
      std::memcpy(scale, &block.d, sizeof block.d);
    }
  }

  const PackedSegment& segment_;
  PackedSizes sizes_;
  int64_t steps_;
  std::byte* memory_;
};

// Gives the segment its place behind `start`; returns where it ends.
size_t lay_out(PackedSegment& segment, int64_t steps, size_t start) {
  const PackedSizes sizes = packed_sizes(segment.format);
  const auto tiles = static_cast<size_t>(segment.panels * steps);
  const size_t slices =
      static_cast<size_t>(segment.panels * ((steps + kSliceSteps - 1) / kSliceSteps)) * kPanelRows;
  const auto part = [&start](size_t& offset, size_t count, int bytes) {
    offset = start;
    start += aligned(count * static_cast<size_t>(bytes));
  };
  part(segment.lanes, tiles * kLanes, sizes.lane);
  part(segment.extras, tiles * kLanes, sizes.extra);
  part(segment.scales, tiles * kPanelRows, sizes.scale);
  part(segment.supers, slices, sizes.super);
  part(segment.row_scales, static_cast<size_t>(segment.panels) * kPanelRows, sizes.row);
  return start;
}

// Into the segment's rows from `first` on.
void pack_source(const Tensor& source, const PackedSegment& segment, int64_t first, int64_t steps,
                 std::byte* memory) {
  Packer packer(segment, steps, memory);
  const size_t from = row_bytes(source.format, source.cols);
  std::vector<float> floats(static_cast<size_t>(source.cols));
  std::vector<std::byte> rounded(row_bytes(source.target, source.cols));
  for (int64_t row = 0; row < source.rows; ++row) {
    const std::byte* data = source.data + static_cast<size_t>(row) * from;
    if (source.target != source.format) {
      dequantize_row(source.format, data, floats.data(), source.cols);
      quantize_row(source.target, floats.data(), rounded.data(), source.cols);
      data = rounded.data();
    }
    packer.row(first + row, data, source.cols);
  }
}

}  // namespace

PackedSizes packed_sizes(Format format) {
  switch (format) {
    case Format::F32:
      return {64, 0, 0, 0, 0};
    case Format::F16:
    case Format::BF16:
      return {32, 0, 0, 0, 0};
    case Format::Q8_0:
      return {16, 0, 2, 0, 0};
    case Format::Q4_0:
      return {8, 0, 2, 0, 0};
    case Format::Q4_1:
      return {8, 0, 4, 0, 0};
    case Format::Q5_0:
      return {8, 2, 2, 0, 0};
    case Format::Q5_1:
      return {8, 2, 4, 0, 0};
    case Format::Q4_K:
      return {8, 0, 2, 4, 0};
    case Format::Q5_K:
      return {8, 2, 2, 4, 0};
    case Format::Q6_K:
      return {8, 4, 2, 4, 0};
    case Format::INT8:
      return {16, 0, 0, 0, 4};
  }
  check(false, "unknown weight format");
  return {};
}

std::unique_ptr<CudaWeight> pack_for_cuda(Arena& arena, std::span<const Tensor> sources,
                                          std::span<const float> bias, Arithmetic arithmetic,
                                          cudaStream_t stream) {
  check(!sources.empty(), "a weight needs a source");
  auto weight = std::make_unique<CudaWeight>(arena);
  weight->cols = sources[0].cols;
  for (const Tensor& source : sources) {
    check(source.cols == weight->cols, "stacked sources differ in columns");
    check(source.target == source.format || is_plain(source.format), "plain floats only are converted");
    if (weight->segments.empty() || weight->segments.back().format != source.target) {
      PackedSegment& segment = weight->segments.emplace_back();
      segment.format = source.target;
      segment.arithmetic = is_plain(source.target) ? Arithmetic::EXACT : arithmetic;
      segment.first_row = weight->rows;
    }
    weight->segments.back().rows += source.rows;
    weight->rows += source.rows;
  }
  size_t bytes = 0;
  for (PackedSegment& segment : weight->segments) {
    segment.panels = (segment.rows + kPanelRows - 1) / kPanelRows;
    bytes = lay_out(segment, weight->steps(), bytes);
  }
  check(bias.empty() || static_cast<int64_t>(bias.size()) == weight->rows, "a bias has one number per row");
  weight->bias = bytes;
  weight->has_bias = !bias.empty();
  bytes += bias.size_bytes();

  std::vector<std::byte> host(bytes);
  int64_t row = 0;
  auto segment = weight->segments.begin();
  for (const Tensor& source : sources) {
    if (row == segment->first_row + segment->rows) ++segment;
    pack_source(source, *segment, row - segment->first_row, weight->steps(), host.data());
    row += source.rows;
  }
  if (!bias.empty()) std::memcpy(host.data() + weight->bias, bias.data(), bias.size_bytes());
  weight->memory = DeviceMemory(arena, bytes);
  copy_to_device(weight->memory.as<std::byte>(), host.data(), bytes, stream);
  cuda_check(cudaStreamSynchronize(stream), "a copy to the GPU");
  return weight;
}

}  // namespace engine::cuda
