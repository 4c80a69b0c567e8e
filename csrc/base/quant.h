// The storage formats of checkpoints: safetensors' plain floats and GGUF's blocks.
// Block layouts follow the GGUF specification (ggml-org/ggml docs/gguf.md and the `gguf` Python package); the
// scalar dequantize_row() here is their definition in this code base, against which every kernel is tested.
#pragma once

#include <cstddef>
#include <cstdint>

namespace engine {

enum class Format : uint8_t { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, INT8 };

inline constexpr int kNumStoredFormats = 11;  // that checkpoints have; INT8 is made while loading
inline constexpr int kNumFormats = 12;

struct BlockQ8_0 {  // 32 weights: d * q
  uint16_t d;       // f16 scale
  int8_t q[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

struct BlockQ4_0 {  // 32 weights: d * (q - 8)
  uint16_t d;
  uint8_t q[16];  // low nibbles are weights 0..15, high nibbles 16..31
};
static_assert(sizeof(BlockQ4_0) == 18);

struct BlockQ4_1 {  // 32 weights: d * q + m
  uint16_t d, m;
  uint8_t q[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

struct BlockQ5_0 {  // 32 weights: d * (q - 16)
  uint16_t d;
  uint8_t qh[4];  // bit i is the fifth bit of weight i
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_0) == 22);

struct BlockQ5_1 {  // 32 weights: d * q + m
  uint16_t d, m;
  uint8_t qh[4];
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_1) == 24);

struct BlockQ4_K {  // 256 weights in 8 groups of 32: d * scale[g] * q - dmin * min[g]
  uint16_t d, dmin;
  uint8_t scales[12];  // 8 six-bit scales and 8 six-bit mins
  uint8_t q[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

struct BlockQ5_K {  // as Q4_K with a fifth bit
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ5_K) == 176);

struct BlockQ6_K {  // 256 weights in 16 groups of 16: d * scale[g] * (q - 32)
  uint8_t ql[128];  // low four bits
  uint8_t qh[64];   // high two bits
  int8_t scales[16];
  uint16_t d;
};
static_assert(sizeof(BlockQ6_K) == 210);

// A row of INT8: an f32 scale, then a signed byte for each column, w = scale · q. Its columns come in
// multiples of 32, as what they are multiplied with is quantised. (BlockInt8 stands for 32 of them.)
struct BlockInt8 {
  int8_t q[32];
};

const char* format_name(Format format);
int block_size(Format format);      // weights in a block; 1 for plain floats
size_t block_bytes(Format format);  // bytes of a block
size_t row_bytes(Format format, int64_t cols);
bool is_plain(Format format);  // F32, F16, BF16

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);  // round to nearest even
float bfloat16_to_float(uint16_t b);
uint16_t float_to_bfloat16(float f);  // round to nearest even

// The scalar definition of each format: `cols` numbers of one row, cols a multiple of block_size(format).
// The arithmetic (order and f32 roundings) is that of the `gguf` package's reference, bit for bit.
void dequantize_row(Format format, const void* row, float* out, int64_t cols);

// The other way: `cols` numbers rounded into F32, F16 or BF16 (to nearest even), INT8 (the largest magnitude
// of the row becomes ±127) or Q4_1 (per block, the scale and offset of least squared error among a few).
void quantize_row(Format format, const float* row, void* out, int64_t cols);

}  // namespace engine
