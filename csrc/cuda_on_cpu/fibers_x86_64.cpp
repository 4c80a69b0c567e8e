#include "cuda_on_cpu/fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>

// Keeps what the calling convention of System V has a function keep; the rest is the caller's to save.
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

// Saves where the caller is in *from and goes on at `to`, which an earlier call saved.
extern "C" void cuda_on_cpu_switch(void** from, void* to);

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4 << 10;
constexpr int kSavedRegisters = 6;

Fiber* entered = nullptr;  // what enter() is to run

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<std::byte*>(memory) + kGuardBytes;
}

Fiber::~Fiber() {
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::start(const std::function<void()>* body) {
  body_ = body;
  ended_ = false;
  // As if the fiber had called switch at the very beginning of enter(): the stack is 16-byte aligned before a
  // call, and a return address lies on top.
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStackBytes) - 2;
  *top = reinterpret_cast<uint64_t>(&Fiber::enter);
  for (int i = 1; i <= kSavedRegisters; ++i) top[-i] = 0;
  here_ = top - kSavedRegisters;
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
  cuda_on_cpu_switch(&outside_, here_);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Fiber::pause() {
  cuda_on_cpu_switch(&here_, outside_);
}

}  // namespace cuda_on_cpu
