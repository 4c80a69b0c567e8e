// The numbers of a key/value cache.
#pragma once

#include "base/check.h"
#include "base/quant.h"
#include "cuda/common.cuh"

namespace engine::cuda {

struct KvF32 {
  using Stored = float;
  __device__ static float store(float x) { return x; }
  __device__ static float load(float x) { return x; }
};
struct KvF16 {
  using Stored = uint16_t;
  __device__ static uint16_t store(float x) { return float_to_half_bits(x); }
  __device__ static float load(uint16_t x) { return half_bits_to_float(x); }
};
struct KvBf16 {
  using Stored = uint16_t;
  __device__ static uint16_t store(float x) { return float_to_bf16_bits(x); }
  __device__ static float load(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
};

template <class Visit>
void visit_kv_format(Format format, Visit visit) {
  if (format == Format::F32) return visit(KvF32{});
  if (format == Format::F16) return visit(KvF16{});
  check(format == Format::BF16, "a key/value cache on a GPU is F32, F16 or BF16");
  visit(KvBf16{});
}

}  // namespace engine::cuda
