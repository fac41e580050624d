// The threads of a block as fibers that take turns.
//
// Blocks run one after another. Within a block, a fiber runs until it waits: at a block barrier
// until every live thread has reached the same barrier, at a collective until every live lane of
// its wave has. If no fiber can run, the error lists how many threads wait at which line. Shared
// memory is allocated for every block, filled with 0xFF bytes, and of exact size, so that
// AddressSanitizer detects accesses past its end. Fibers can run in either order: a result that
// depends on the order lacks a barrier.
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
  void* resume_at[5];  // __builtin_setjmp buffer: swapcontext would cost two system calls
  bool is_begun = false;
  char* stack;
  int waits_at = 0;         // source line of the barrier or collective; 0: can run
  bool is_in_wave = false;  // waits for its wave, else for its block
  bool is_done = false;
  uint32_t sent = 0, received = 0;  // the value that the lane passed to a collective; its copy
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
// Pass `value` to a collective; returns the lanes of this wave, each with its value in `received`.
const Fiber* exchange(uint32_t value, int line);

// Run `kernel` in every thread of every block; stops at a divergent barrier, which `take_error`
// reports.
void launch(int x, int y, int z, int threads, int wave, bool is_reversed,
            const std::function<void()>& kernel);
const char* take_error();  // the error since the last call; empty if none

}  // namespace portalm::emulator
