// Runs the blocks of a grid one after the other, the threads of a block as fibers that take turns wherever
// they wait for each other. What a GPU leaves undefined is an error here: threads of a block at different
// barriers, lanes of a warp at different collectives, indices out of bounds, races on shared memory, memory
// that nobody has written.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running thread

namespace cuda_on_cpu {

inline constexpr int kWarp = 32;
inline constexpr int kMaxValue = 64;  // bytes that a lane shows to its warp at once

// A program that is wrong on a GPU, whatever came out here.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// In which order blocks, warps and lanes get their turns. What depends on it is a race.
enum class Schedule { ASCENDING, DESCENDING };
void set_schedule(Schedule schedule);

struct Here {             // where the running thread is
  int thread = 0;         // within the block
  uint64_t block = 0;     // of all blocks ever run
  int barriers = 0;       // of the block, passed so far
  int warp_barriers = 0;  // of the warp
};
inline Here* running = nullptr;
inline const Here& here() {
  return *running;
}

[[noreturn]] void fail(const std::string& what);

// Runs body() for every thread of the grid.
void run(dim3 grid, dim3 block, const std::function<void()>& body);

void block_barrier();
void warp_barrier(unsigned mask);
// Shows `size` bytes to the warp and waits until all its lanes have done so; those of lane i are then at
// seen + i * kMaxValue, until the calling lane's next collective.
const unsigned char* exchange(const char* operation, unsigned mask, const void* value, size_t size);

}  // namespace cuda_on_cpu
