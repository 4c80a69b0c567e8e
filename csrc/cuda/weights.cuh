// Reading packed weights (packed_weight.h) on the device.
#pragma once

#include "base/quant.h"
#include "cuda/common.cuh"
#include "cuda/packed_weight.h"

namespace engine::cuda {

struct Matrix {  // one segment
  View<const uint8_t> lanes, extras, scales, supers;
  View<const float> row_scales;  // (panels · 16)
  int steps, panels;

  __device__ size_t tile(int panel, int step) const {
    return static_cast<size_t>(panel) * static_cast<size_t>(steps) + static_cast<size_t>(step);
  }
};

// Of one row in one step: w = scale[half] · (q - zero) + offset.
struct RowScales {
  float scale[2], offset;
};

// What distinguishes the formats of quants: bits, kZero, and what their scales are.
enum class Scales { HALF, HALF_AND_OFFSET, SUPER, SUPER_PAIR, ROW };

template <int kBits_, int kZero_, Scales kScales_>
struct Quants {
  static constexpr int kBits = kBits_, kZero = kZero_;
  static constexpr Scales kScales = kScales_;
  static constexpr bool kHasOffset = kScales_ == Scales::HALF_AND_OFFSET || kScales_ == Scales::SUPER;
  static constexpr bool kTwoGroups = kScales_ == Scales::SUPER_PAIR;  // of 16 columns each

  // A lane's 16 quants, unsigned, as bytes: q[2 half + upper] holds the four of e = 8 upper + 4 half on.
  __device__ static void load(const Matrix& m, size_t tile, int lane, uint32_t (&q)[4]) {
    const size_t index = tile * kWarpSize + static_cast<size_t>(lane);
    if constexpr (kBits == 8) {
      const auto word = m.lanes.load<uint4>(index * 16);
      q[0] = word.x, q[2] = word.y, q[1] = word.z, q[3] = word.w;
    } else {
      constexpr uint32_t nibbles = 0x0f0f0f0f;
      const auto word = m.lanes.load<uint2>(index * 8);
      q[0] = word.x & nibbles, q[2] = word.x >> 4 & nibbles;
      q[1] = word.y & nibbles, q[3] = word.y >> 4 & nibbles;
    }
    if constexpr (kBits == 5) {
      const uint32_t bits = m.extras.load<uint16_t>(index * 2);
      for (int i = 0; i < 4; ++i) q[i] |= fifth_bits(bits >> (4 * (i / 2 + i % 2 * 2)) & 15);
    }
    if constexpr (kBits == 6) {
      const auto bits = m.extras.load<uint32_t>(index * 4);
      for (int i = 0; i < 4; ++i) q[i] |= (bits >> (2 * (i / 2 + i % 2 * 2)) & 0x03030303) << 4;
    }
  }

  // `row` is the one of the panel.
  __device__ static RowScales scales(const Matrix& m, int panel, int step, int row) {
    const size_t at = m.tile(panel, step) * kPanelRows + static_cast<size_t>(row);
    if constexpr (kScales == Scales::ROW) {
      const float scale = m.row_scales[static_cast<size_t>(panel * kPanelRows + row)];
      return {{scale, scale}, -0.0f};
    } else if constexpr (kScales == Scales::HALF) {
      const float scale = half_bits_to_float(m.scales.load<uint16_t>(2 * at));
      return {{scale, scale}, -0.0f};
    } else if constexpr (kScales == Scales::HALF_AND_OFFSET) {
      const auto both = m.scales.load<uint32_t>(4 * at);
      const float scale = half_bits_to_float(static_cast<uint16_t>(both));
      return {{scale, scale}, half_bits_to_float(static_cast<uint16_t>(both >> 16))};
    } else {
      const uint32_t bytes = m.scales.load<uint16_t>(2 * at);
      const int slices = (m.steps + kSliceSteps - 1) / kSliceSteps;
      const size_t slice =
          static_cast<size_t>(panel) * static_cast<size_t>(slices) + static_cast<size_t>(step / kSliceSteps);
      const auto super = m.supers.load<uint32_t>(4 * (slice * kPanelRows + static_cast<size_t>(row)));
      const float d = half_bits_to_float(static_cast<uint16_t>(super));
      if constexpr (kScales == Scales::SUPER_PAIR) {
        return {{d * static_cast<float>(static_cast<int8_t>(bytes & 255)),
                 d * static_cast<float>(static_cast<int8_t>(bytes >> 8))},
                -0.0f};
      } else {
        const float scale = d * static_cast<float>(bytes & 255);
        const float dmin = half_bits_to_float(static_cast<uint16_t>(super >> 16));
        return {{scale, scale}, -(dmin * static_cast<float>(bytes >> 8))};
      }
    }
  }

 private:
  // Bit i becomes bit 4 of byte i.
  __device__ static uint32_t fifth_bits(uint32_t bits) {
    return (bits & 1) << 4 | (bits & 2) << 11 | (bits & 4) << 18 | (bits & 8) << 25;
  }
};

template <Format kFormat>
struct Stored;
template <>
struct Stored<Format::Q8_0> : Quants<8, 128, Scales::HALF> {};
template <>
struct Stored<Format::Q4_0> : Quants<4, 8, Scales::HALF> {};
template <>
struct Stored<Format::Q4_1> : Quants<4, 0, Scales::HALF_AND_OFFSET> {};
template <>
struct Stored<Format::Q5_0> : Quants<5, 16, Scales::HALF> {};
template <>
struct Stored<Format::Q5_1> : Quants<5, 0, Scales::HALF_AND_OFFSET> {};
template <>
struct Stored<Format::Q4_K> : Quants<4, 0, Scales::SUPER> {};
template <>
struct Stored<Format::Q5_K> : Quants<5, 0, Scales::SUPER> {};
template <>
struct Stored<Format::Q6_K> : Quants<6, 32, Scales::SUPER_PAIR> {};
template <>
struct Stored<Format::INT8> : Quants<8, 128, Scales::ROW> {};

// A lane's 16 weights of a tile as f32, w[e], in the arithmetic of dequantize_row().
template <Format kFormat>
__device__ void dequantise(const Matrix& m, int panel, int step, int lane, float (&w)[kLaneWeights]) {
  const size_t tile = m.tile(panel, step);
  if constexpr (kFormat == Format::F32) {
    for (int chunk = 0; chunk < 4; ++chunk) {
      const auto v = m.lanes.load<float4>(
          ((tile * 4 + static_cast<size_t>(chunk)) * kWarpSize + static_cast<size_t>(lane)) * 16);
      w[4 * chunk] = v.x, w[4 * chunk + 1] = v.y, w[4 * chunk + 2] = v.z, w[4 * chunk + 3] = v.w;
    }
  } else if constexpr (kFormat == Format::F16 || kFormat == Format::BF16) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      const auto v = m.lanes.load<uint4>(
          ((tile * 2 + static_cast<size_t>(chunk)) * kWarpSize + static_cast<size_t>(lane)) * 16);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      for (int i = 0; i < 4; ++i) {
        const auto low = static_cast<uint16_t>(words[i]), high = static_cast<uint16_t>(words[i] >> 16);
        constexpr bool half = kFormat == Format::F16;
        w[8 * chunk + 2 * i] = half ? half_bits_to_float(low) : bits_to_float(words[i] << 16);
        w[8 * chunk + 2 * i + 1] = half ? half_bits_to_float(high) : bits_to_float(words[i] & 0xffff0000);
      }
    }
  } else {
    using S = Stored<kFormat>;
    uint32_t q[4];
    S::load(m, tile, lane, q);
    for (int upper = 0; upper < 2; ++upper) {
      const RowScales s = S::scales(m, panel, step, lane / 4 + 8 * upper);
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 4; ++i) {
          const int byte = static_cast<int>(q[2 * half + upper] >> (8 * i) & 255);
          w[8 * upper + 4 * half + i] = s.scale[half] * static_cast<float>(byte - S::kZero) + s.offset;
        }
    }
  }
}

}  // namespace engine::cuda
