// Device code on a CPU: what gpu_compat.h needs, with each thread of a block a fiber of its own.
//
// Blocks run one after the other; within one, a fiber runs until it waits. A block barrier parks it
// until every live thread has arrived at the same one, a collective until every lane of its wave
// has: anything else is an error that says who waits where. Shared memory is new in every block,
// filled with NaN, and of exact size, so that AddressSanitizer sees its ends. Fibers take turns in
// either order: results that depend on it lack a barrier.
#pragma once

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define PORTALM_BOUNDS(threads)
#define PORTALM_SHARED(type, name, count) \
  type* const name = static_cast<type*>(::portalm::emulator::shared(__LINE__, sizeof(type) * (count)))

namespace portalm {
constexpr int kWave = PORTALM_EMULATED;

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  const void* waits_at = nullptr;  // call site; null: it can run
  bool is_in_wave = false;         // what it waits for: its wave, else its block
  bool is_done = false;
  uint32_t given = 0, taken = 0;   // of a shuffle
  void* sanitizer_stack = nullptr;
};

struct Block {
  int x, y, z;
  std::vector<Fiber> fibers;
  int running = 0;
  std::map<int, std::unique_ptr<char[]>> shared;
};

extern Block block;

void* shared(int line, size_t bytes);
void wait(bool is_in_wave, const void* site);
// Gives `value` to the other lanes: those of this wave, with what each gave in `taken`.
const Fiber* exchange(uint32_t value, const void* site);

// Runs `kernel` in every thread of every block, up to one whose barrier diverges: `take_error` says so.
void launch(int x, int y, int z, int threads, bool is_reversed, const std::function<void()>& kernel);
const char* take_error();  // empty: none since it was last asked

}  // namespace emulator

inline int thread_index() { return emulator::block.running; }
inline int block_x() { return emulator::block.x; }
inline int block_y() { return emulator::block.y; }
inline int block_z() { return emulator::block.z; }

[[gnu::noinline]] inline void block_barrier() {
  emulator::wait(false, __builtin_return_address(0));
}
inline void device_fence() {}

[[gnu::noinline]] inline uint32_t shuffle(uint32_t value, int source_lane) {
  return emulator::exchange(value, __builtin_return_address(0))[source_lane].taken;
}
[[gnu::noinline]] inline bool any_lane(bool is) {
  const emulator::Fiber* lanes = emulator::exchange(is, __builtin_return_address(0));
  for (int lane = 0; lane < kWave; ++lane)
    if (lanes[lane].taken) return true;
  return false;
}

template <typename V>
V atomic_add(V* p, V value) {
  const V before = *p;
  *p += value;
  return before;
}
inline void shared_add(uint64_t* p, uint64_t value) { *p += value; }
inline void shared_min(int32_t* p, int32_t value) { *p = value < *p ? value : *p; }

inline float exp2_of(float x) { return exp2f(x); }
inline float exp_of(float x) { return expf(x); }
inline float log_of(float x) { return logf(x); }
inline double ceil_of(double x) { return ceil(x); }
template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace portalm
