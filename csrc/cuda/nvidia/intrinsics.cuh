// What kernels use beyond plain CUDA C++: views of memory, conversions, and the matrix instructions, as PTX.
// Its twin in csrc/cuda_on_cpu/ does the same on a CPU and checks what a GPU does not; the include path
// chooses.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace engine {

// A pointer and, in the twin, the number of elements that may be accessed through it.
template <class T>
class View {
 public:
  View() = default;
  __host__ __device__ View(T* data, size_t) : data_(data) {}
  template <class U>
    requires std::is_same_v<const U, T>
  __host__ __device__ View(View<U> other) : View(other.data(), 0) {}
  __host__ __device__ T* data() const { return data_; }

  __device__ T& operator[](size_t i) const { return data_[i]; }
  __device__ View from(size_t start) const { return {data_ + start, 0}; }
  // sizeof(V) bytes from element i on, which are aligned as V asks, in one access.
  template <class V>
  __device__ V load(size_t i) const {
    return *reinterpret_cast<const V*>(data_ + i);
  }
  template <class V>
  __device__ void store(size_t i, V value) const {
    *reinterpret_cast<V*>(data_ + i) = value;
  }
  __host__ __device__ explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
};

// An array in shared memory; the twin looks for races on it.
template <class T, int kSize>
class Shared {
 public:
  __device__ T& operator[](int i) { return data_[i]; }
  // As View::load().
  template <class V>
  __device__ V load(int i) const {
    return *reinterpret_cast<const V*>(data_ + i);
  }
  // In one access, whoever else adds; gives what was there before.
  __device__ T add(int i, T value) { return atomicAdd(&data_[i], value); }

 private:
  alignas(16) T data_[kSize];
};

__device__ inline float half_bits_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ inline uint16_t float_to_half_bits(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ inline uint16_t float_to_bf16_bits(float f) {
  uint16_t b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
  return b;
}
__device__ inline float bits_to_float(uint32_t bits) {
  return __uint_as_float(bits);
}
__device__ inline uint32_t float_to_bits(float f) {
  return __float_as_uint(f);
}
// The first one in the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// How the PTX ISA ("Matrix Fragments for mma") lays matrices over a warp: with g = lane / 4 and t = lane % 4,
// a lane has of A rows g and g + 8, of B column g, and of C and D rows g and g + 8, columns 2t and 2t + 1.

// c (16, 8) += a (16, 16) · b (16, 8) of bf16. A lane has of A's row g columns 2t, 2t + 1 (a[0]) and 2t + 8,
// 2t + 9 (a[2]), of row g + 8 the same (a[1], a[3]), and of B those rows.
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c (16, 8) += a (16, 32) · b (32, 8), unsigned bytes by signed ones: exact. A lane has of A's row g columns
// 4t … 4t + 3 (a[0]) and 4t + 16 … 4t + 19 (a[2]), of row g + 8 the same (a[1], a[3]), and of B those rows.
__device__ inline void mma_u8s8_k32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Likewise with a (16, 16) and b (16, 8).
__device__ inline void mma_u8s8_k16(int (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

}  // namespace engine
