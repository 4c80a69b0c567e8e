// One pool of threads for every operation. The caller is worker 0, so a pool of size 1 has no threads at all.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace engine {

class ThreadPool {
 public:
  // num_threads counts the caller; 0: one per core that this process may run on.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls task(index, worker) for each index in [0, num_tasks), worker in [0, size()), and returns when all
  // are done. Each worker begins with an equal share of consecutive tasks, in order, and then takes what
  // others have left. One thread may call run() at a time, and never from within a task. The first exception
  // of a task reaches the caller, after the barrier; tasks after it may or may not have run.
  template <class F>
  void run(int num_tasks, F&& task) {
    const void* address = std::addressof(task);
    run(num_tasks, &call<std::remove_reference_t<F>>, const_cast<void*>(address));
  }

 private:
  using Call = void (*)(void* task, int index, int worker);

  template <class F>
  static void call(void* task, int index, int worker) {
    (*static_cast<F*>(task))(index, worker);
  }
  // What is left of one worker's tasks: [next, end) in one word, so that taking one is one exchange.
  struct alignas(64) Share {
    std::atomic<uint64_t> range = 0;  // end << 32 | next
    bool take(int& index);
  };
  void run(int num_tasks, Call call, void* task);
  void work(int worker);                  // takes tasks until none is left to take
  void serve(int worker);                 // a thread's life
  void wait_for_run(int& seen);           // until there was another one, or the pool is being destroyed
  int work_on(Share& share, int worker);  // the number of tasks done
  void start(int num_threads);
  void stop();

  Call call_ = nullptr;
  void* task_ = nullptr;
  std::exception_ptr error_;
  std::atomic<bool> failed_ = false;
  std::atomic<bool> stopping_ = false;
  // A worker reads the job above only after it has taken a task: that keeps run() from returning under it,
  // and a worker that the kernel did not schedule in time delays nobody. Cores exchange few cache lines in a
  // run: that it began, one share each unless somebody steals, and that they are done.
  std::unique_ptr<Share[]> shares_;  // (size())
  alignas(64) std::atomic<int> unfinished_ = 0;
  alignas(64) std::atomic<int> runs_ = 0;  // what workers wait on
  std::vector<std::thread> threads_;       // (size() - 1)
};

}  // namespace engine
