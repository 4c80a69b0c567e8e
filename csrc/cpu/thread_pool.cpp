#include "cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <system_error>
#include <utility>

#include "base/check.h"

namespace engine {
namespace {

using Clock = std::chrono::steady_clock;

// A forward pass is a chain of short operations: the next one usually comes before a sleeper could wake up.
// But on a machine with few cores somebody else may need the one that we spin on, hence the yields, and the
// end.
constexpr auto kPoll = std::chrono::microseconds(20);
constexpr auto kYield = std::chrono::microseconds(100);

constexpr int kMaxThreads = 1024;

// True as soon as ready() is; false after kYield. Reading the clock paces the loop as a pause instruction
// would.
template <class Ready>
bool spin(Ready ready) {
  const auto start = Clock::now();
  while (!ready()) {
    const auto waited = Clock::now() - start;
    if (waited > kYield) return false;
    if (waited > kPoll) std::this_thread::yield();
  }
  return true;
}

int usable_cores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  require(num_threads >= 0 && num_threads <= kMaxThreads, "num_threads must be 0 (one per core) to " +
                                                              std::to_string(kMaxThreads) + ", not " +
                                                              std::to_string(num_threads));
  start(num_threads == 0 ? usable_cores() : num_threads);
}

ThreadPool::~ThreadPool() {
  stop();
}

void ThreadPool::start(int num_threads) {
  shares_ = std::make_unique<Share[]>(static_cast<size_t>(num_threads));
  threads_.reserve(num_threads - 1);
  try {
    for (int worker = 1; worker < num_threads; ++worker)
      threads_.emplace_back([this, worker] { serve(worker); });
  } catch (const std::system_error& e) {
    const std::string started = std::to_string(size());
    stop();
    throw InputError("cannot start " + std::to_string(num_threads) + " threads, only " + started + " (" +
                     e.what() + "): lower --threads");
  }
}

void ThreadPool::stop() {
  stopping_ = true;
  ++runs_;
  runs_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(int num_tasks, Call call, void* task) {
  if (num_tasks <= 1 || threads_.empty()) {
    for (int index = 0; index < num_tasks; ++index) call(task, index, 0);
    return;
  }
  check(unfinished_ == 0, "ThreadPool::run called while it runs");
  call_ = call;
  task_ = task;
  unfinished_.store(num_tasks, std::memory_order_relaxed);
  for (int64_t worker = 0; worker < size(); ++worker) {
    const auto next = static_cast<uint64_t>(worker * num_tasks / size());
    const auto end = static_cast<uint64_t>((worker + 1) * num_tasks / size());
    shares_[worker].range.store(end << 32 | next, std::memory_order_release);
  }
  runs_.fetch_add(1, std::memory_order_release);
  runs_.notify_all();

  work(0);
  spin([this] { return unfinished_.load(std::memory_order_acquire) == 0; });
  while (const int left = unfinished_.load(std::memory_order_acquire)) unfinished_.wait(left);
  if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
}

bool ThreadPool::Share::take(int& index) {
  uint64_t left = range.load(std::memory_order_relaxed);
  while (static_cast<uint32_t>(left) < left >> 32) {
    if (range.compare_exchange_weak(left, left + 1, std::memory_order_acq_rel, std::memory_order_relaxed)) {
      index = static_cast<int>(static_cast<uint32_t>(left));
      return true;
    }
  }
  return false;
}

int ThreadPool::work_on(Share& share, int worker) {
  int done = 0;
  for (int index; share.take(index); ++done) {
    try {
      call_(task_, index, worker);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }
  return done;
}

void ThreadPool::work(int worker) {
  for (int i = 0; i < size(); ++i) {
    const int done = work_on(shares_[(worker + i) % size()], worker);
    if (done > 0 && unfinished_.fetch_sub(done, std::memory_order_acq_rel) == done) unfinished_.notify_one();
  }
}

void ThreadPool::wait_for_run(int& seen) {
  const auto called = [&] { return stopping_ || runs_.load(std::memory_order_acquire) != seen; };
  while (!spin(called)) runs_.wait(seen);
  seen = runs_.load(std::memory_order_acquire);
}

void ThreadPool::serve(int worker) {
  for (int seen = 0; !stopping_;) {
    wait_for_run(seen);
    work(worker);
  }
}

}  // namespace engine
