// Cooperative threads on stacks of their own: switching is a few instructions and no system call. x86-64
// only.
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>

namespace cuda_on_cpu {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Begins anew; `body` runs at the next resume(). What an earlier body left on the stack is forgotten.
  void start(const std::function<void()>* body);
  // Called from outside: runs until the body calls pause() or ends. Rethrows what ended the body.
  void resume();
  // Called from the body: returns to whoever called resume().
  void pause();
  bool ended() const { return ended_; }

 private:
  static void enter();

  std::byte* stack_;  // (kStackBytes), above a page that must not be touched
  void* here_ = nullptr;
  void* outside_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  bool ended_ = true;
};

}  // namespace cuda_on_cpu
