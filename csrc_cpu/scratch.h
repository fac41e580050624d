// scratch: working memory of the calling thread, kept between calls.
#pragma once

#include "simd.h"

namespace portalm::PORTALM_ISA {

// At least `floats` floats, 64-byte aligned, contents undefined; valid until the thread's next call
// with the same `Use`. Grows when needed and is never given back.
template <int Use = 0>
inline float* scratch(int64_t floats) {
  static thread_local float* data = nullptr;
  static thread_local int64_t size = 0;
  if (floats > size) {
    __builtin_free(data);
    size = floats;
    data = static_cast<float*>(__builtin_malloc(floats * 4 + 64));
  }
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(data) + 63) & ~uintptr_t{63});
}

}  // namespace portalm::PORTALM_ISA
