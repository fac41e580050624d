// parallel_for: loops shared by the thread team. with_dtype: dtypes as template arguments.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "thread_team.h"

namespace portalm::PORTALM_ISA {

// Call body(begin, end) for pieces of at most `grain` that make up [0, count); each thread takes
// the next piece when it finishes one. Fewer than `serial_below` items run on the calling thread
// alone.
template <typename Body>
PORTALM_INLINE void parallel_for(int64_t count, int64_t grain, const Body& body,
                                 int64_t serial_below = 0) {
  ThreadTeam& team = ThreadTeam::instance();
  if (count <= grain || count < serial_below || team.size() == 1) {
    if (count > 0) body(0, count);
    return;
  }
  struct Context {
    const Body& body;
    int64_t count, grain;
    alignas(64) int64_t next;
  } context{body, count, grain, 0};
  team.run(
      [](void* p, int, int) {
        Context& c = *static_cast<Context*>(p);
        for (;;) {
          int64_t begin = __atomic_fetch_add(&c.next, c.grain, __ATOMIC_RELAXED);
          if (begin >= c.count) return;
          c.body(begin, min_of(begin + c.grain, c.count));
        }
      },
      &context);
}

template <typename Body>
PORTALM_INLINE void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: body(float{}); break;
    case DType::bf16: body(bf16{}); break;
    case DType::f16: body(fp16{}); break;
    default: break;  // codes of a cache are not operands
  }
}

// The same for the elements of a cache, which may be codes.
template <typename Body>
PORTALM_INLINE void with_kv_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::i8: body(i8{}); break;
    case DType::f8: body(f8{}); break;
    default: with_dtype(dtype, body);
  }
}

}  // namespace portalm::PORTALM_ISA
