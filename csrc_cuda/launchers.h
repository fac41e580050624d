// Launchers: choose the kernel and the grid of an operation. They are the same for every device;
// `launch` is implemented per device. Addresses are integers, dtypes are DType numbers
// (arguments.h), strides are in elements; the caller keeps memory alive and has checked shapes
// (backends/gpu_common/native.py). All parameters are int64_t or double, so that Python can call
// them without conversion.
#pragma once

#include "arguments.h"

namespace portalm {

#define PORTALM_KERNEL(name, Args, threads, ...) name,
enum class Kernel {
#include "instances.h"
};

#define PORTALM_KERNEL(name, Args, threads, ...) "portalm_" #name,
inline constexpr const char* kKernelNames[] = {
#include "instances.h"
};
constexpr int kNumKernels = sizeof(kKernelNames) / sizeof(kKernelNames[0]);

struct Grid {
  int64_t x, y, z;
  int threads;
};

// Enqueue the kernel on `stream` with a copy of the arguments. Throws std::runtime_error if the
// device reports an error.
void launch(Kernel kernel, const Grid& grid, const void* arguments, int64_t bytes, int64_t stream);

// Each enqueues one operation on `stream`, or nothing if the operation is empty. They throw
// std::invalid_argument for a dtype or shape that no kernel was built for.
extern "C" {
void decode_attention(int64_t stream, int64_t dtype, int64_t key_cache, int64_t value_cache,
                      int64_t block_stride, int64_t token_stride, int64_t head_stride,
                      int64_t block_size, int64_t query, int64_t query_stride, int64_t out,
                      int64_t block_table, int64_t table_stride, int64_t seq_lens, int64_t items,
                      int64_t num_items, int64_t partials, int64_t counters, int64_t num_kv_heads,
                      int64_t group_size, int64_t head_size, double scale, double soft_cap,
                      int64_t window, int64_t slopes, int64_t sinks);
}

}  // namespace portalm
