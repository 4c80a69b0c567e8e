#include "base/quant.h"

#include <bit>
#include <cstring>
#include <string>

#include "base/blocks.h"
#include "base/check.h"

namespace engine {
namespace {

struct FormatInfo {
  const char* name;
  int block_size;
  size_t block_bytes;
};

constexpr FormatInfo kFormats[kNumFormats] = {
    {"F32", 1, 4},
    {"F16", 1, 2},
    {"BF16", 1, 2},
    {"Q8_0", 32, sizeof(BlockQ8_0)},
    {"Q4_0", 32, sizeof(BlockQ4_0)},
    {"Q4_1", 32, sizeof(BlockQ4_1)},
    {"Q5_0", 32, sizeof(BlockQ5_0)},
    {"Q5_1", 32, sizeof(BlockQ5_1)},
    {"Q4_K", 256, sizeof(BlockQ4_K)},
    {"Q5_K", 256, sizeof(BlockQ5_K)},
    {"Q6_K", 256, sizeof(BlockQ6_K)},
};

const FormatInfo& info(Format format) {
  const auto index = static_cast<size_t>(format);
  check(index < kNumFormats, "unknown weight format");
  return kFormats[index];
}

template <class T>
T read(const std::byte* data, int64_t index) {
  T value;
  std::memcpy(&value, data + static_cast<size_t>(index) * sizeof(T), sizeof(T));
  return value;
}

// w = scale · (q - zero point) + offset, per group of columns that share a scale. An offset of -0 changes no
// sum.
template <class Block>
void dequantize_blocks(const std::byte* row, float* out, int64_t cols) {
  using Layout = BlockLayout<Block>;
  for (int64_t b = 0; b < cols / Layout::kCols; ++b) {
    const Block block = read<Block>(row, b);
    for (int g = 0; g < Layout::kCols / Layout::kGroup; ++g, out += Layout::kGroup) {
      uint8_t q[Layout::kGroup];
      Layout::quants(block, g, q);
      const float scale = Layout::scale(block, g), offset = Layout::offset(block, g);
      for (int i = 0; i < Layout::kGroup; ++i) {
        out[i] = scale * static_cast<float>(q[i] - Layout::kZero) + offset;
      }
    }
  }
}

}  // namespace

const char* format_name(Format format) {
  return info(format).name;
}
int block_size(Format format) {
  return info(format).block_size;
}
size_t block_bytes(Format format) {
  return info(format).block_bytes;
}

size_t row_bytes(Format format, int64_t cols) {
  const FormatInfo& f = info(format);
  check(cols >= 0 && cols % f.block_size == 0, "columns are not a multiple of the block size");
  return static_cast<size_t>(cols / f.block_size) * f.block_bytes;
}

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = h & 0x7c00, mantissa = h & 0x3ff;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  const uint32_t bias = exponent == 0x7c00 ? 0x70000000 : 0x38000000;  // infinity and NaN keep all bits set
  return std::bit_cast<float>(sign | (((exponent | mantissa) << 13) + bias));
}

uint16_t float_to_half(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00 | ((magnitude >> 13) & 0x3ff);
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 2^16 or more
  if (magnitude < 0x38800000) {                       // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3f000000);
  }
  const uint32_t even = (magnitude >> 13) & 1;
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + even) >> 13);
}

float bfloat16_to_float(uint16_t b) {
  return std::bit_cast<float>(static_cast<uint32_t>(b) << 16);
}

uint16_t float_to_bfloat16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);  // a quiet NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void dequantize_row(Format format, const void* row, float* out, int64_t cols) {
  const auto* data = static_cast<const std::byte*>(row);
  check(cols % block_size(format) == 0, "columns are not a multiple of the block size");
  switch (format) {
    case Format::F32:
      std::memcpy(out, data, row_bytes(format, cols));
      return;
    case Format::F16:
      for (int64_t i = 0; i < cols; ++i) out[i] = half_to_float(read<uint16_t>(data, i));
      return;
    case Format::BF16:
      for (int64_t i = 0; i < cols; ++i) out[i] = bfloat16_to_float(read<uint16_t>(data, i));
      return;
    default:
      visit_block(format, [&]<class Block>(Block) { dequantize_blocks<Block>(data, out, cols); });
  }
}

void quantize_plain_row(Format format, const float* row, void* out, int64_t cols) {
  check(block_size(format) == 1, "quantize_plain_row writes F32, F16 and BF16 only");
  if (format == Format::F32) {
    std::memcpy(out, row, row_bytes(format, cols));
    return;
  }
  const auto convert = format == Format::F16 ? float_to_half : float_to_bfloat16;
  auto* bytes = static_cast<std::byte*>(out);
  for (int64_t i = 0; i < cols; ++i) {
    const uint16_t value = convert(row[i]);
    std::memcpy(bytes + static_cast<size_t>(i) * sizeof value, &value, sizeof value);
  }
}

}  // namespace engine
