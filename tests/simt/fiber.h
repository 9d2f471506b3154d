// Stacks, and the switch between them: hand-written for x86-64 (about 2 ns), ucontext elsewhere.
//
// Layout: stacks are cut from large mappings, each with a page below it that may not be touched, and are used again
// and again. Invariant: the sanitizers are told of every switch, through functions that are null where a program is not
// sanitized; this file and simt.cpp are compiled without them.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__) || defined(TSAM_SIMT_UCONTEXT)
#include <ucontext.h>
#define TSAM_SIMT_ASM 0
#else
#define TSAM_SIMT_ASM 1
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t size);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

#if TSAM_SIMT_ASM
// Saves the callee's registers on the running stack and its pointer in *save, then continues at `load`.
extern "C" __attribute__((visibility("hidden"))) void tsam_simt_switch(void** save, void* load);
asm(R"(
.pushsection .text
.hidden tsam_simt_switch
.globl tsam_simt_switch
.type tsam_simt_switch, @function
tsam_simt_switch:
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
.size tsam_simt_switch, .-tsam_simt_switch
.popsection
)");
#endif

namespace simt {

constexpr size_t kStackBytes = 256 * 1024, kPage = 4096;

// A place to continue at: the host's own, or a fiber's.
struct Context {
  char* bottom = nullptr;  // of the stack, lowest address
  size_t size = 0;
  void* fake_stack = nullptr;  // ASan's
#if TSAM_SIMT_ASM
  void* pointer = nullptr;
#else
  ucontext_t registers;
#endif
};

// Makes a context that calls `entry`, which never returns.
inline void prepare(Context& context, void (*entry)()) {
  context.fake_stack = nullptr;
#if TSAM_SIMT_ASM
  // From the top: a null return address for whoever walks the stack, entry, six registers. At entry the pointer is 8
  // below a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(context.bottom + context.size);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context.pointer = top - 8;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = context.bottom;
  context.registers.uc_stack.ss_size = context.size;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

// `ends`: nobody comes back to `from`. Whoever is switched to calls arrived() first.
inline void switch_context(Context& from, Context& to, bool ends) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#if TSAM_SIMT_ASM
  tsam_simt_switch(&from.pointer, to.pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
}

inline void arrived(Context& here, Context* host) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &size);
  if (host == nullptr) return;
  host->bottom = static_cast<char*>(const_cast<void*>(bottom));
  host->size = size;
}

// Stacks that are free; more are mapped when none is.
class Stacks {
 public:
  Context* take() {
    if (free_.empty()) map_more();
    Context* const context = free_.back();
    free_.pop_back();
    return context;
  }
  void reserve(size_t count) {
    while (all_.size() < count) map_more();
    free_.reserve(all_.size());
  }
  void give(Context* context) { free_.push_back(context); }

  // After an error fibers are left where they stand: all stacks are free again, whatever ASan knows of their frames.
  void give_all() {
    free_ = all_;
    if (__asan_unpoison_memory_region)
      for (const Context* context : all_) __asan_unpoison_memory_region(context->bottom, context->size);
  }

 private:
  void map_more() {
    constexpr size_t kCount = 64, kEach = kStackBytes + kPage;
    void* const memory =
        mmap(nullptr, kCount * kEach, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    for (size_t i = 0; i < kCount; ++i) {
      char* const guard = static_cast<char*>(memory) + i * kEach;
      mprotect(guard, kPage, PROT_NONE);
      Context* const context = new Context();
      context->bottom = guard + kPage;
      context->size = kStackBytes;
      all_.push_back(context);
      free_.push_back(context);
    }
  }

  std::vector<Context*> all_, free_;
};

}  // namespace simt
