#include "fibers.h"

#include <string.h>

#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define __asan_unpoison_memory_region(...)
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#endif

namespace portalm::emulator {

Block block;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kStackStride = kStackBytes + 832;  // at powers of 2, stacks would share cache sets
std::vector<char> stacks;
void* scheduler[5];
const void* scheduler_stack;
size_t scheduler_stack_bytes;
const std::function<void()>* kernel;
std::string message;

Fiber& current() { return block.fibers[block.running]; }

// not instrumented: the sanitizer would treat the jump as the end of all frames, with a system call
[[gnu::noinline, gnu::no_sanitize_address]] void jump(void** to) { __builtin_longjmp(to, 1); }

[[gnu::no_sanitize_address]] void back_to_scheduler() {
  Fiber& fiber = current();
  __sanitizer_start_switch_fiber(fiber.is_done ? nullptr : &fiber.sanitizer_stack, scheduler_stack,
                                 scheduler_stack_bytes);
  if (!__builtin_setjmp(fiber.resume_at)) jump(scheduler);
  __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void run_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel)();
  current().is_done = true;
  back_to_scheduler();
}

[[gnu::no_sanitize_address]] void resume(int thread) {
  block.running = thread;
  [[maybe_unused]] void* own_stack = nullptr;
  __sanitizer_start_switch_fiber(&own_stack, current().stack, kStackBytes);
  if (!__builtin_setjmp(scheduler)) {
    if (current().is_begun) jump(current().resume_at);
    current().is_begun = true;
    setcontext(&current().beginning);
  }
  __sanitizer_finish_switch_fiber(own_stack, nullptr, nullptr);
}

// Release threads [first, last) if all live ones wait at the same line for their wave (or block).
bool release(int first, int last, bool is_wave) {
  int line = 0;
  for (int i = first; i < last; ++i) {
    const Fiber& fiber = block.fibers[i];
    if (fiber.is_done) continue;
    if (!fiber.waits_at || fiber.is_in_wave != is_wave) return false;
    if (line && fiber.waits_at != line) return false;
    line = fiber.waits_at;
  }
  if (!line) return false;
  for (int i = first; i < last; ++i) {
    Fiber& fiber = block.fibers[i];
    if (is_wave && !fiber.is_done) fiber.received = fiber.sent;
    fiber.waits_at = 0;
  }
  return true;
}

void describe_wait() {
  std::map<std::pair<int, bool>, int> waiting;
  int num_done = 0;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.is_done) ++num_done;
    else ++waiting[{fiber.waits_at, fiber.is_in_wave}];
  }
  message = "divergent barrier in block " + std::to_string(block.x) + ", " +
            std::to_string(block.y) + ", " + std::to_string(block.z) + ": ";
  for (const auto& [wait, count] : waiting)
    message += std::to_string(count) + " threads in a " +
               (wait.second ? "collective" : "block barrier") + " at line " +
               std::to_string(wait.first) + ", ";
  message += std::to_string(num_done) + " have finished";
}

bool run_block(bool is_reversed) {
  const int threads = static_cast<int>(block.fibers.size());
  for (Fiber& fiber : block.fibers) {
    fiber.waits_at = 0;
    fiber.is_done = fiber.is_begun = false;
    __asan_unpoison_memory_region(fiber.stack,
                                  kStackBytes);  // for frames that never returned
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack = {fiber.stack, 0, kStackBytes};
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, run_fiber, 0);
  }
  for (;;) {
    bool is_progress = false, is_live = false;
    for (int i = 0; i < threads; ++i) {
      const int thread = is_reversed ? threads - 1 - i : i;
      Fiber& fiber = block.fibers[thread];
      if (fiber.is_done || fiber.waits_at) continue;
      resume(thread);
      is_progress = true;
    }
    for (int first = 0; first < threads; first += block.wave)
      is_progress |= release(first, first + block.wave, true);
    is_progress |= release(0, threads, false);
    for (const Fiber& fiber : block.fibers) is_live |= !fiber.is_done;
    if (!is_live) return true;
    if (!is_progress) return false;
  }
}

}  // namespace

void* shared(int line, size_t bytes) {
  std::unique_ptr<char[]>& memory = block.shared[line];
  if (!memory) {
    memory.reset(new char[bytes]);
    memset(memory.get(), 0xFF, bytes);
  }
  return memory.get();
}

void wait(bool is_in_wave, int line) {
  current().is_in_wave = is_in_wave;
  current().waits_at = line;
  back_to_scheduler();
}

const Fiber* exchange(uint32_t value, int line) {
  const int thread = block.running;
  current().sent = value;
  wait(true, line);
  return &block.fibers[thread / block.wave * block.wave];
}

void launch(int x, int y, int z, int threads, int wave, bool is_reversed,
            const std::function<void()>& body) {
  kernel = &body;
  block.wave = wave;
  block.fibers.clear();
  block.fibers.resize(threads);
  if (stacks.size() < threads * kStackStride) stacks.resize(threads * kStackStride);
  for (int i = 0; i < threads; ++i) block.fibers[i].stack = &stacks[i * kStackStride];
  for (block.z = 0; block.z < z; ++block.z)
    for (block.y = 0; block.y < y; ++block.y)
      for (block.x = 0; block.x < x; ++block.x) {
        block.shared.clear();
        if (!run_block(is_reversed)) {
          describe_wait();
          return;
        }
      }
}

const char* take_error() {
  static std::string taken;
  taken = std::move(message);
  message.clear();
  return taken.c_str();
}

}  // namespace portalm::emulator
