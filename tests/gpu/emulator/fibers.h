// Threads of a block as fibers, which take turns.
//
// Blocks run one after the other; within one, a fiber runs until it waits. A block barrier parks it
// until every live thread has arrived at the same one, a collective until every lane of its wave
// has: anything else is an error that says who waits where. Shared memory is new in every block,
// filled with NaN, and of exact size, so that AddressSanitizer sees its ends. Fibers take turns in
// either order: results that depend on it lack a barrier.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace portalm::emulator {

struct Fiber {
  ucontext_t beginning;
  void* resume_at[5];  // of __builtin_setjmp, once it has begun: swapcontext costs two system calls
  bool is_begun = false;
  char* stack;
  int waits_at = 0;         // line of the source; 0: it can run
  bool is_in_wave = false;  // what it waits for: its wave, else its block
  bool is_done = false;
  uint32_t given = 0, taken = 0;  // of a shuffle
  void* sanitizer_stack = nullptr;
};

struct Block {
  int x, y, z, wave;
  std::vector<Fiber> fibers;
  int running = 0;
  std::map<int, std::unique_ptr<char[]>> shared;
};

extern Block block;

void* shared(int line, size_t bytes);
void wait(bool is_in_wave, int line);
// Gives `value` to the other lanes: those of this wave, with what each gave in `taken`.
const Fiber* exchange(uint32_t value, int line);

// Runs `kernel` in every thread of every block, up to one whose barrier diverges: `take_error` says so.
void launch(int x, int y, int z, int threads, int wave, bool is_reversed,
            const std::function<void()>& kernel);
const char* take_error();  // empty: none since it was last asked

}  // namespace portalm::emulator
