// For CPUs that fibers_x86_64.cpp has no code for: slower, for it asks the system at every switch.
#include <ucontext.h>

#include <utility>
#include <vector>

#include "cuda_on_cpu/fibers.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 128 << 10;

Fiber* entered = nullptr;  // what enter() is to run

ucontext_t* context(void* p) {
  return static_cast<ucontext_t*>(p);
}

}  // namespace

Fiber::Fiber() : stack_(new std::byte[kStackBytes]), here_(new ucontext_t), outside_(new ucontext_t) {}

Fiber::~Fiber() {
  delete context(here_);
  delete context(outside_);
  delete[] stack_;
}

void Fiber::start(const std::function<void()>* body) {
  body_ = body;
  ended_ = false;
  getcontext(context(here_));
  context(here_)->uc_stack.ss_sp = stack_;
  context(here_)->uc_stack.ss_size = kStackBytes;
  context(here_)->uc_link = nullptr;
  makecontext(context(here_), &Fiber::enter, 0);
}

void Fiber::enter() {
  Fiber* self = entered;
  try {
    (*self->body_)();
  } catch (...) {
    self->error_ = std::current_exception();
  }
  self->ended_ = true;
  self->pause();
}

void Fiber::resume() {
  entered = this;
  swapcontext(context(outside_), context(here_));
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Fiber::pause() {
  swapcontext(context(here_), context(outside_));
}

}  // namespace cuda_on_cpu
