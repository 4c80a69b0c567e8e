// Rounds float weights to the format that they are packed in, sixteen channels at a time: column by column
// what quantize_row() does row by row, to the same bits. Included by linear.inl.
#pragma once

#include "cpu/linear_rows.inl"
#include "cpu/panel.inl"

namespace engine {
namespace {

// Added to a number below 2^22 in magnitude: the sum's lowest bits are those of the nearest integer.
constexpr float kToInteger = 0x1.8p23f;

void columns_to_f32(const float* columns, int64_t cols, std::byte* panel) {
  auto* out = reinterpret_cast<float*>(panel);
  for (int64_t k = 0; k < cols; ++k) store(out + 16 * k, load(columns + 16 * k));
}

void columns_to_f16(const float* columns, int64_t cols, std::byte* panel) {
  auto* out = reinterpret_cast<uint16_t*>(panel);
  for (int64_t k = 0; k < cols; ++k) store_f16(out + 16 * k, load(columns + 16 * k));
}

// Columns beyond the last, up to a whole tile, are zeros.
void columns_to_bf16(const float* columns, int64_t cols, std::byte* panel) {
  auto* out = reinterpret_cast<uint16_t*>(panel);
  for (int64_t k = 0; k < cols || k % kPaddedCols != 0; ++k) {
    uint16_t column[16];
    store_bf16(column, k < cols ? load(columns + 16 * k) : zero());
    for (int lane = 0; lane < 16; ++lane) out[16 * (k - k % 2) + 2 * lane + k % 2] = column[lane];
  }
}

// Rotated as activations are, and divided by the size of the rotation.
void columns_to_int8(float* columns, int64_t cols, std::byte* panel) {
  I32x16 most_bits = zero_i32();
  for (int64_t begin = 0; begin < cols; begin += RowTile::kCols) {
    float* block = columns + 16 * begin;
    const int count = min_int(RowTile::kCols, static_cast<int>(cols - begin));
    rotate_columns(block, count);
    for (int i = 0; i < count; ++i) {
      const F32x16 x = load(block + 16 * i) * broadcast(1.0f / static_cast<float>(count));
      store(block + 16 * i, x);
      most_bits = max(bits(x) & 0x7fffffff, most_bits);
    }
  }
  const F32x16 most = from_bits(most_bits);
  const F32x16 inverse = where_less(broadcast(kSmallest), most, broadcast(127) / most, zero());
  // Of an infinity or NaN the difference is NaN: a broken weight must not look like a number.
  store(reinterpret_cast<float*>(panel), most / broadcast(127) + (most - most));
  std::byte* out = panel + kHeaderBytes<BlockInt8>;
  for (int64_t k = 0; k < cols; k += 4, out += 64) {
    I32x16 four = zero_i32();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F32x16 q = load(columns + 16 * (k + i)) * inverse + broadcast(kToInteger + 128);
      four = four | shift_left(bits(q) & 0xff, 8 * i);
    }
    store_i32(out, four);
  }
}

// Channels' scales and offsets for 32 columns, as f16 holds them, and what quants are found with.
struct Affine {
  F32x16 scale, offset, inverse;

  // The quant of each channel's number: the nearest of 0 to 15.
  F32x16 quant(F32x16 x) const {
    const F32x16 q = min(max((x - offset) * inverse + broadcast(0.5f), zero()), broadcast(15));
    const F32x16 nearest = round(q);
    return where_less(q, nearest, nearest - broadcast(1), nearest);
  }
};

inline F32x16 through_f16(F32x16 x) {
  uint16_t halves[16];
  store_f16(halves, x);
  return load_f16(halves);
}

inline Affine affine(F32x16 scale, F32x16 offset) {
  scale = through_f16(scale);
  const F32x16 magnitude = max(scale, zero() - scale);
  return {scale, through_f16(offset), where_less(zero(), magnitude, broadcast(1) / scale, zero())};
}

inline F32x16 squared_error(const float* columns, const Affine& a) {
  F32x16 error = zero();
  for (int i = 0; i < 32; ++i) {
    const F32x16 x = load(columns + 16 * i);
    const F32x16 miss = x - (a.scale * a.quant(x) + a.offset);
    error = error + miss * miss;
  }
  return error;
}

// The scale and offset of least squared error for the quants that `a` finds: a line through 32 points.
inline Affine fit(const float* columns, const Affine& a) {
  F32x16 sum_q = zero(), sum_qq = zero(), sum_x = zero(), sum_qx = zero();
  for (int i = 0; i < 32; ++i) {
    const F32x16 x = load(columns + 16 * i), q = a.quant(x);
    sum_q = sum_q + q;
    sum_qq = sum_qq + q * q;
    sum_x = sum_x + x;
    sum_qx = sum_qx + q * x;
  }
  const F32x16 n = broadcast(32), spread = n * sum_qq - sum_q * sum_q;
  const F32x16 scale = (n * sum_qx - sum_q * sum_x) / spread;
  const F32x16 offset = (sum_x - scale * sum_q) / n;
  return affine(where_less(zero(), spread, scale, a.scale), where_less(zero(), spread, offset, a.offset));
}

void round_block(const float* columns, Panel<BlockQ4_1>& out) {
  F32x16 low = load(columns), high = low, poison = zero();
  for (int i = 0; i < 32; ++i) {
    const F32x16 x = load(columns + 16 * i);
    low = where_less(x, low, x, low);
    high = where_less(x, high, high, x);
    poison = poison + (x - x);
  }
  Affine best = affine((high - low) / broadcast(15), low);
  F32x16 least = squared_error(columns, best);
  constexpr float kShrinks[] = {0.0f, 0.05f, 0.1f, 0.15f};
  for (const float shrink : kShrinks) {
    const F32x16 range = (high - low) * broadcast(1 - 2 * shrink);
    const Affine a = fit(columns, affine(range / broadcast(15), low + (high - low) * broadcast(shrink)));
    const F32x16 error = squared_error(columns, a);
    best = {where_less(error, least, a.scale, best.scale), where_less(error, least, a.offset, best.offset),
            where_less(error, least, a.inverse, best.inverse)};
    least = where_less(error, least, error, least);
  }
  store_f16(out.d, best.scale + poison);
  store_f16(out.m, best.offset);
  for (int i = 0; i < 4; ++i) {
    I32x16 eight = zero_i32();
    for (int j = 0; j < 8; ++j) {
      const F32x16 q = best.quant(load(columns + 16 * (8 * i + j))) + broadcast(kToInteger);
      eight = eight | shift_left(bits(q) & 15, 8 * (j % 4) + j / 4 * 4);
    }
    store_i32(out.q[i], eight);
  }
}

void columns_to_q4_1(const float* columns, int64_t cols, std::byte* panel) {
  auto* out = reinterpret_cast<Panel<BlockQ4_1>*>(panel);
  for (int64_t b = 0; b < cols / 32; ++b) round_block(columns + 16 * 32 * b, out[b]);
}

void round_weights(Format format, float* columns, int64_t cols, std::byte* panel) {
  switch (format) {
    case Format::F32:
      return columns_to_f32(columns, cols, panel);
    case Format::F16:
      return columns_to_f16(columns, cols, panel);
    case Format::BF16:
      return columns_to_bf16(columns, cols, panel);
    case Format::INT8:
      return columns_to_int8(columns, cols, panel);
    case Format::Q4_1:
      return columns_to_q4_1(columns, cols, panel);
    default:
      __builtin_trap();
  }
}

}  // namespace
}  // namespace engine
