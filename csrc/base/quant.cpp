#include "base/quant.h"

#include <algorithm>
#include <bit>
#include <cmath>
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
    {"INT8", 32, sizeof(BlockInt8)},
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
  return static_cast<size_t>(cols / f.block_size) * f.block_bytes +
         (format == Format::INT8 ? sizeof(float) : 0);
}

bool is_plain(Format format) {
  return format <= Format::BF16;
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
    case Format::INT8: {
      const auto scale = read<float>(data, 0);
      for (int64_t i = 0; i < cols; ++i)
        out[i] = scale * static_cast<float>(read<int8_t>(data + sizeof scale, i));
      return;
    }
    default:
      visit_block(format, [&]<class Block>(Block) { dequantize_blocks<Block>(data, out, cols); });
  }
}

namespace {

template <class T>
void write(std::byte* data, int64_t index, T value) {
  std::memcpy(data + static_cast<size_t>(index) * sizeof(T), &value, sizeof(T));
}

// 0, or NaN if there is a NaN or an infinity: added to a scale, it keeps a broken weight from looking like a
// number.
float poison(const float* x, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] - x[i];
  return sum;
}

void quantize_int8(const float* row, std::byte* out, int64_t cols) {
  float most = 0;
  for (int64_t i = 0; i < cols; ++i) most = std::max(most, std::abs(row[i]));
  const float inverse = most > 0x1p-100f && std::isfinite(most) ? 127 / most : 0;
  write(out, 0, most / 127 + poison(row, cols));
  auto* q = reinterpret_cast<int8_t*>(out + sizeof(float));
  for (int64_t i = 0; i < cols; ++i) q[i] = static_cast<int8_t>(std::lrintf(row[i] * inverse));
}

// 32 numbers as scale · q + offset, and the squared error of that.
struct Affine {
  float scale, offset, error;
  uint8_t q[32];
};

// With scale and offset as f16 holds them.
Affine round_affine(const float* x, float scale, float offset) {
  Affine a{half_to_float(float_to_half(scale)), half_to_float(float_to_half(offset)), 0, {}};
  const float inverse = a.scale != 0 ? 1 / a.scale : 0;
  for (int i = 0; i < 32; ++i) {
    const float q = std::min(15.0f, std::max(0.0f, (x[i] - a.offset) * inverse + 0.5f));
    a.q[i] = static_cast<uint8_t>(q);
    const float miss = x[i] - (a.scale * static_cast<float>(a.q[i]) + a.offset);
    a.error += miss * miss;
  }
  return a;
}

// The scale and offset of least squared error for given quants: a line through 32 points.
Affine fit_affine(const float* x, const Affine& a) {
  float sum_q = 0, sum_qq = 0, sum_x = 0, sum_qx = 0;
  for (int i = 0; i < 32; ++i) {
    const float q = a.q[i];
    sum_q += q;
    sum_qq += q * q;
    sum_x += x[i];
    sum_qx += q * x[i];
  }
  const float spread = 32 * sum_qq - sum_q * sum_q;
  if (spread == 0) return a;
  const float scale = (32 * sum_qx - sum_q * sum_x) / spread;
  return round_affine(x, scale, (sum_x - scale * sum_q) / 32);
}

// Starts from a few ranges narrower than that of the numbers, which round most of them more finely.
BlockQ4_1 quantize_q4_1(const float* x) {
  const auto [low, high] = std::minmax_element(x, x + 32);
  Affine best = round_affine(x, (*high - *low) / 15, *low);
  for (const float shrink : {0.0f, 0.05f, 0.1f, 0.15f}) {
    const float range = (*high - *low) * (1 - 2 * shrink);
    const Affine a = fit_affine(x, round_affine(x, range / 15, *low + (*high - *low) * shrink));
    if (a.error < best.error) best = a;
  }
  BlockQ4_1 block{float_to_half(best.scale + poison(x, 32)), float_to_half(best.offset), {}};
  for (int i = 0; i < 16; ++i) block.q[i] = static_cast<uint8_t>(best.q[i] | best.q[16 + i] << 4);
  return block;
}

}  // namespace

void quantize_row(Format format, const float* row, void* out, int64_t cols) {
  auto* bytes = static_cast<std::byte*>(out);
  const size_t size = row_bytes(format, cols);
  switch (format) {
    case Format::F32:
      std::memcpy(out, row, size);
      return;
    case Format::F16:
      for (int64_t i = 0; i < cols; ++i) write(bytes, i, float_to_half(row[i]));
      return;
    case Format::BF16:
      for (int64_t i = 0; i < cols; ++i) write(bytes, i, float_to_bfloat16(row[i]));
      return;
    case Format::INT8:
      return quantize_int8(row, bytes, cols);
    case Format::Q4_1:
      for (int64_t b = 0; b < cols / 32; ++b) write(bytes, b, quantize_q4_1(row + 32 * b));
      return;
    default:
      check(false, "nothing is quantised to this format");
  }
}

}  // namespace engine
