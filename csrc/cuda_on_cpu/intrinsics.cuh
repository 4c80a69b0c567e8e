// The emulated twin of cuda/nvidia/intrinsics.cuh: the same names with the same meaning, in plain C++, and
// with the checks that a GPU does not make.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <string>
#include <type_traits>
#include <utility>

#include "base/quant.h"

namespace engine {

template <class T>
class View {
 public:
  View() = default;
  View(T* data, size_t size) : data_(data), size_(size) {}
  template <class U>
    requires std::is_same_v<const U, T>
  View(View<U> other) : View(other.data(), other.size()) {}
  T* data() const { return data_; }
  size_t size() const { return size_; }

  T& operator[](size_t i) const {
    if (i >= size_) outside(i, 1);
    return data_[i];
  }
  View from(size_t start) const {
    if (start > size_) outside(start, 0);
    return {data_ + start, size_ - start};
  }
  template <class V>
  V load(size_t i) const {
    return *at<V>(i);
  }
  template <class V>
  void store(size_t i, V value) const {
    *at<V>(i) = value;
  }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  template <class V>
  auto at(size_t i) const {
    constexpr size_t count = sizeof(V) / sizeof(T);
    if (i + count > size_) outside(i, count);
    auto* address = reinterpret_cast<std::conditional_t<std::is_const_v<T>, const V*, V*>>(data_ + i);
    if (reinterpret_cast<uintptr_t>(address) % alignof(V) != 0)
      cuda_on_cpu::fail("an access of " + std::to_string(sizeof(V)) + " bytes is not aligned");
    return address;
  }
  void outside(size_t i, size_t count) const {
    cuda_on_cpu::fail("elements [" + std::to_string(i) + ", " + std::to_string(i + count) + ") of " +
                      std::to_string(size_));
  }

  T* data_ = nullptr;
  size_t size_ = 0;
};

// Of shared memory: who read and wrote an element, to find accesses that no barrier separates.
class Accesses {
 public:
  void read() {
    const cuda_on_cpu::Here& me = cuda_on_cpu::here();
    if (writer_.block != me.block) cuda_on_cpu::fail("shared memory is read that nobody has written");
    refuse(writer_, me, "is read, and written by");
    refuse(adder_, me, "is read, and added to by");
    if (readers_[0].thread != me.thread || readers_[0].block != me.block) readers_[1] = readers_[0];
    readers_[0] = {me.block, me.thread, me.barriers, me.warp_barriers};
  }
  void write() {
    const cuda_on_cpu::Here& me = cuda_on_cpu::here();
    refuse(writer_, me, "is written, and written by");
    refuse(adder_, me, "is written, and added to by");
    for (const Access& reader : readers_) refuse(reader, me, "is written, and read by");
    writer_ = {me.block, me.thread, me.barriers, me.warp_barriers};
  }
  // Any number of threads may add at once, but not while one reads or writes.
  void add() {
    const cuda_on_cpu::Here& me = cuda_on_cpu::here();
    if (writer_.block != me.block) cuda_on_cpu::fail("shared memory is added to that nobody has written");
    refuse(writer_, me, "is added to, and written by");
    for (const Access& reader : readers_) refuse(reader, me, "is added to, and read by");
    adder_ = {me.block, kAnyone, me.barriers, me.warp_barriers};
  }

 private:
  static constexpr int kAnyone = -cuda_on_cpu::kWarp;  // a thread of no warp
  struct Access {
    uint64_t block = 0;
    int thread = 0, barriers = 0, warp_barriers = 0;
  };
  static void refuse(const Access& other, const cuda_on_cpu::Here& me, const char* what) {
    if (other.block != me.block || other.thread == me.thread || other.barriers != me.barriers) return;
    const bool same_warp = other.thread / cuda_on_cpu::kWarp == me.thread / cuda_on_cpu::kWarp;
    if (same_warp && other.warp_barriers != me.warp_barriers) return;
    const std::string who = other.thread == kAnyone ? "others" : "thread " + std::to_string(other.thread);
    cuda_on_cpu::fail("a race: shared memory " + std::string(what) + " " + who +
                      ", without a barrier between");
  }
  Access writer_, adder_, readers_[2];
};

template <class T, int kSize>
class Shared {
 public:
  class Element {
   public:
    Element(T& value, Accesses& accesses) : value_(value), accesses_(accesses) {}
    operator T() const {
      accesses_.read();
      return value_;
    }
    Element& operator=(T value) {
      accesses_.write();
      value_ = value;
      return *this;
    }
    Element& operator=(const Element& other) { return *this = static_cast<T>(other); }
    Element& operator+=(T value) { return *this = static_cast<T>(*this) + value; }

   private:
    T& value_;
    Accesses& accesses_;
  };
  Element operator[](int i) {
    check_index(i);
    return {data_[i], accesses_[i]};
  }
  template <class V>
  V load(int i) {
    constexpr int count = sizeof(V) / sizeof(T);
    if (i % count != 0)
      cuda_on_cpu::fail("a shared access of " + std::to_string(sizeof(V)) + " bytes is not aligned");
    T values[count];
    for (int k = 0; k < count; ++k) values[k] = (*this)[i + k];
    return std::bit_cast<V>(values);
  }
  T add(int i, T value) {
    check_index(i);
    accesses_[i].add();
    return std::exchange(data_[i], data_[i] + value);
  }

 private:
  static void check_index(int i) {
    if (i < 0 || i >= kSize)
      cuda_on_cpu::fail("shared element " + std::to_string(i) + " of " + std::to_string(kSize));
  }

  T data_[kSize];
  Accesses accesses_[kSize];
};

inline float half_bits_to_float(uint16_t h) {
  return half_to_float(h);
}
inline uint16_t float_to_half_bits(float f) {
  return float_to_half(f);
}
inline uint16_t float_to_bf16_bits(float f) {
  return float_to_bfloat16(f);
}
inline float bits_to_float(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
inline uint32_t float_to_bits(float f) {
  return std::bit_cast<uint32_t>(f);
}
inline uint32_t pack_bf16(float low, float high) {
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
}

// How the PTX ISA ("Matrix Fragments for mma") lays matrices over a warp: with g = lane / 4 and t = lane % 4,
// a lane has of A rows g and g + 8, of B column g, and of C and D rows g and g + 8, columns 2t and 2t + 1.
namespace emulated {

struct Fragment {
  uint32_t a[4], b[2];
};

// c[i] += Σ_k a(row, k) · b(k, col). Multiply reads k's operands out of the fragments of the lanes that have
// them.
template <class T, class Multiply>
void mma(const char* operation, T (&c)[4], const Fragment& mine, int depth, Multiply multiply) {
  const auto* seen = cuda_on_cpu::exchange(operation, ~0u, &mine, sizeof mine);
  const int lane = cuda_on_cpu::here().thread % cuda_on_cpu::kWarp;
  const auto of = [&](int l) -> const Fragment& {
    return *reinterpret_cast<const Fragment*>(seen + l * cuda_on_cpu::kMaxValue);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, upper = i / 2, col = lane % 4 * 2 + i % 2;
    for (int k = 0; k < depth; ++k) c[i] = multiply(c[i], of, row, upper, col, k);
  }
}

inline int byte_of(uint32_t word, int i) {
  return static_cast<int>(word >> (8 * i) & 255);
}

}  // namespace emulated

// c (16, 8) += a (16, 16) · b (16, 8) of bf16. The products are exact; here their sum is rounded after each
// addition, a tensor core rounds in a way of its own.
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulated::Fragment mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulated::mma("mma_bf16", c, mine, 16, [](float sum, auto of, int row, int upper, int col, int k) {
    const int owner = k % 8 / 2, word = k / 8, shift = k % 2 * 16;
    const uint32_t x = of(row * 4 + owner).a[2 * word + upper] >> shift << 16;
    const uint32_t y = of(col * 4 + owner).b[word] >> shift << 16;
    return sum + std::bit_cast<float>(x) * std::bit_cast<float>(y);
  });
}

// c (16, 8) += a (16, 32) · b (32, 8), unsigned bytes by signed ones: exact.
inline void mma_u8s8_k32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulated::Fragment mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulated::mma("mma_u8s8_k32", c, mine, 32, [](int sum, auto of, int row, int upper, int col, int k) {
    const int owner = k % 16 / 4, word = k / 16;
    const int x = emulated::byte_of(of(row * 4 + owner).a[2 * word + upper], k % 4);
    const int y = static_cast<int8_t>(emulated::byte_of(of(col * 4 + owner).b[word], k % 4));
    return sum + x * y;
  });
}

// Likewise with a (16, 16) and b (16, 8).
inline void mma_u8s8_k16(int (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  const emulated::Fragment mine{{a[0], a[1], 0, 0}, {b, 0}};
  emulated::mma("mma_u8s8_k16", c, mine, 16, [](int sum, auto of, int row, int upper, int col, int k) {
    const int x = emulated::byte_of(of(row * 4 + k / 4).a[upper], k % 4);
    const int y = static_cast<int8_t>(emulated::byte_of(of(col * 4 + k / 4).b[0], k % 4));
    return sum + x * y;
  });
}

}  // namespace engine
