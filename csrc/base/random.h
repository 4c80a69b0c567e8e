// Counter-based random numbers: a pure function of (seed, position, stream), so that sampling has no state to
// carry, preempt or restore, and a token depends on nothing but its own request.
#pragma once

#include <cstdint>

namespace engine {

// The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): a bijection of 64 bits that passes BigCrush
// as a stream.
constexpr uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

constexpr uint64_t random_bits(uint64_t seed, uint64_t position) {
  constexpr uint64_t golden = 0x9e3779b97f4a7c15ULL;
  return mix64(mix64(seed + golden) + (position + 1) * golden);
}

// Uniform in [0, 1) with 53 bits.
constexpr double random_uniform(uint64_t seed, uint64_t position) {
  return static_cast<double>(random_bits(seed, position) >> 11) * 0x1.0p-53;
}

}  // namespace engine
