// Device code on a CPU: the functions that gpu_compat.h needs, over the fibers of fibers.h.
#pragma once

#include <math.h>
#include <string.h>

#include "fibers.h"

#define __global__
#define __device__
#define PORTALM_BOUNDS(threads)
#define PORTALM_SHARED(type, name, count) \
  type* const name =                      \
      static_cast<type*>(::portalm::emulator::shared(__LINE__, sizeof(type) * (count)))

namespace portalm {
constexpr int kWave = PORTALM_EMULATED;

inline int thread_index() { return emulator::block.running; }
inline int block_x() { return emulator::block.x; }
inline int block_y() { return emulator::block.y; }

// `line` is the caller's line, which identifies the barrier.
inline void block_barrier(int line = __builtin_LINE()) { emulator::wait(false, line); }
inline void device_fence() {}
inline void wait_for_inputs() {}

inline uint32_t shuffle(uint32_t value, int source_lane, int line = __builtin_LINE()) {
  return emulator::exchange(value, line)[source_lane].received;
}
inline bool any_lane(bool is, int line = __builtin_LINE()) {
  const emulator::Fiber* lanes = emulator::exchange(is, line);
  for (int lane = 0; lane < kWave; ++lane)
    if (lanes[lane].received) return true;
  return false;
}

template <typename V>
V atomic_add(V* p, V value) {
  const V before = *p;
  *p += value;
  return before;
}

inline float exp2_of(float x) { return exp2f(x); }
template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace portalm
