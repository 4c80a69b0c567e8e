#include "cuda_on_cpu/grid.h"

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_on_cpu/fibers.h"

namespace cuda_on_cpu {
namespace {

constexpr int kMaxThreads = 1024;  // of a block

enum class State { READY, AT_BARRIER, AT_COLLECTIVE, ENDED };

struct Thread {
  dim3 index;
  Here here;
  State state = State::READY;
  int collectives = 0;  // passed so far
  Fiber fiber;
};

struct Warp {
  const char* operation = nullptr;  // the collective that some lanes wait at
  int waiting = 0;
  // Of two collectives: a lane that has gone on to the next one must not overwrite what others still read.
  unsigned char values[2][kWarp * kMaxValue];
};

std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;
int block_size = 0;
uint64_t blocks_run = 0;
Schedule schedule = Schedule::ASCENDING;

int in_turn(int i, int n) {
  return schedule == Schedule::ASCENDING ? i : n - 1 - i;
}

Thread& current() {
  return *threads[static_cast<size_t>(running->thread)];
}

std::string text(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

void wait_as(State state) {
  Thread& self = current();
  self.state = state;
  self.fiber.pause();
}

// Gives every lane that can run a turn; true if there was one.
bool run_warp(int warp) {
  bool ran = false;
  for (int i = 0; i < kWarp; ++i) {
    Thread& thread = *threads[static_cast<size_t>(warp * kWarp + in_turn(i, kWarp))];
    if (thread.state != State::READY) continue;
    ran = true;
    running = &thread.here;
    threadIdx = thread.index;
    thread.fiber.resume();
    if (thread.fiber.ended()) thread.state = State::ENDED;
  }
  return ran;
}

int count(State state) {
  int n = 0;
  for (int i = 0; i < block_size; ++i) n += threads[static_cast<size_t>(i)]->state == state;
  return n;
}

void release_barrier() {
  for (int i = 0; i < block_size; ++i) {
    Thread& thread = *threads[static_cast<size_t>(i)];
    thread.state = State::READY;
    ++thread.here.barriers;
  }
}

void run_block() {
  const int num_warps = block_size / kWarp;
  while (true) {
    bool ran = false;
    for (int w = 0; w < num_warps; ++w)
      while (run_warp(in_turn(w, num_warps))) ran = true;
    if (count(State::ENDED) == block_size) return;
    if (count(State::AT_BARRIER) == block_size) {
      release_barrier();
    } else if (!ran) {
      const std::string what = std::to_string(count(State::AT_BARRIER)) + " of " +
                               std::to_string(block_size) + " threads wait at __syncthreads(), " +
                               std::to_string(count(State::AT_COLLECTIVE)) + " for their warp, and " +
                               std::to_string(count(State::ENDED)) + " have ended";
      throw Fault("block " + text(blockIdx) + ": " + what);
    }
  }
}

void start_block(dim3 block, dim3 index, const std::function<void()>& body) {
  ++blocks_run;
  blockIdx = index;
  for (int i = 0; i < block_size; ++i) {
    Thread& thread = *threads[static_cast<size_t>(i)];
    const auto u = static_cast<unsigned>(i);
    thread.index = dim3(u % block.x, u / block.x % block.y, u / block.x / block.y);
    thread.here = {i, blocks_run, 0, 0};
    thread.state = State::READY;
    thread.collectives = 0;
    thread.fiber.start(&body);
  }
  for (Warp& warp : warps) warp.waiting = 0;
}

}  // namespace

void set_schedule(Schedule order) {
  schedule = order;
}

void fail(const std::string& what) {
  throw Fault("block " + text(blockIdx) + ", thread " + text(threadIdx) + ": " + what);
}

void run(dim3 grid, dim3 block, const std::function<void()>& body) {
  const unsigned size = block.x * block.y * block.z;
  if (size == 0 || size > kMaxThreads || size % kWarp != 0)
    throw Fault("a block is whole warps, at most 1024 threads, not " + std::to_string(size));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw Fault("no grid may be " + text(grid));
  block_size = static_cast<int>(size);
  blockDim = block;
  gridDim = grid;
  while (threads.size() < size) threads.push_back(std::make_unique<Thread>());
  warps.resize(size / kWarp);
  const auto num_blocks = static_cast<int>(grid.x * grid.y * grid.z);
  for (int i = 0; i < num_blocks; ++i) {
    const auto u = static_cast<unsigned>(in_turn(i, num_blocks));
    start_block(block, dim3(u % grid.x, u / grid.x % grid.y, u / grid.x / grid.y), body);
    run_block();
  }
}

void block_barrier() {
  wait_as(State::AT_BARRIER);
}

const unsigned char* exchange(const char* operation, unsigned mask, const void* value, size_t size) {
  if (mask != ~0u) fail(std::string(operation) + ": all lanes of a warp take part, so the mask is ~0");
  Thread& self = current();
  Warp& warp = warps[static_cast<size_t>(self.here.thread / kWarp)];
  if (warp.waiting > 0 && std::strcmp(warp.operation, operation) != 0)
    fail(std::string("one lane is at ") + operation + ", another at " + warp.operation);
  warp.operation = operation;
  unsigned char* seen = warp.values[self.collectives++ % 2];
  std::memcpy(seen + self.here.thread % kWarp * kMaxValue, value, size);
  if (++warp.waiting < kWarp) {
    wait_as(State::AT_COLLECTIVE);
    return seen;
  }
  warp.waiting = 0;
  const auto first = static_cast<size_t>(self.here.thread / kWarp * kWarp);
  for (size_t i = first; i < first + kWarp; ++i) threads[i]->state = State::READY;
  return seen;
}

void warp_barrier(unsigned mask) {
  exchange("__syncwarp", mask, nullptr, 0);
  ++running->warp_barriers;
}

}  // namespace cuda_on_cpu
