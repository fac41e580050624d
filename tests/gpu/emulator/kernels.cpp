// The kernels on the emulator, a third device in addition to csrc_cuda/kernels.cu and csrc_rocm.
#include <stdio.h>

#include "device_code.cuh"
#include "launchers.h"

namespace portalm {
namespace { bool is_reversed = false; }

void launch(Kernel kernel, const Grid& grid, const void* arguments, int64_t, int64_t) {
#define PORTALM_KERNEL(name, Args, threads, ...)                          \
  if (kernel == Kernel::name) {                                           \
    const Args args = *static_cast<const Args*>(arguments);               \
    emulator::launch(grid.x, grid.y, grid.z, threads, kWave, is_reversed, \
                     [&] { portalm_##name(args); });                      \
  }
#include "instances.h"
}

extern "C" {
void set_reversed(int64_t is) { is_reversed = is != 0; }
const char* take_error() { return emulator::take_error(); }

// Faulty kernels, to check that the emulator detects them.
void divergent_barrier() {
  emulator::launch(1, 1, 1, 2 * kWave, kWave, is_reversed, [] {
    if (thread_index() < kWave) block_barrier();
    else block_barrier();
  });
}
void half_a_shuffle() {
  emulator::launch(1, 1, 1, kWave, kWave, is_reversed, [] {
    if (thread_index() % 2) shuffle(uint32_t{1}, 0);
    else block_barrier();
  });
}
// With a barrier, out[i] would be what thread i + 1 wrote; the barrier is missing.
void missing_barrier(int64_t out, int64_t num_threads) {
  emulator::launch(1, 1, 1, num_threads, kWave, is_reversed, [=] {
    PORTALM_SHARED(int32_t, written, 1024);
    written[thread_index()] = thread_index();
    reinterpret_cast<int32_t*>(out)[thread_index()] = written[(thread_index() + 1) % num_threads];
  });
}
void past_shared_memory() {
  emulator::launch(1, 1, 1, kWave, kWave, is_reversed, [] {
    PORTALM_SHARED(int32_t, small, kWave - 1);
    small[thread_index()] = 1;
  });
}
}

}  // namespace portalm
