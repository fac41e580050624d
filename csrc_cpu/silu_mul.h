// silu_mul: silu(gate) * up. silu is rounded to the dtype first, as in torch.
//
//   gate_up   [T, 2 I], gate first; out [T, I]
//
// Mapping:  the team shares the rows.
// Bound by: memory.
// Meaning:  TorchBackend.silu_mul of portalm_backends.portable.
// Tested:   tests/unit/test_cpu_kernels.py
#pragma once

#include "parallel.h"

namespace portalm::PORTALM_ISA {

PORTALM_INLINE Vec silu(Vec x) {
  // e^-|x| cannot overflow: 1 / (1 + e^-x) for x >= 0, e^x / (1 + e^x) below
  Vec e = exp_of(select(x < splat(0.0f), x, -x));
  Vec top = select(x < splat(0.0f), e, splat(1.0f));
  return x * (top / (splat(1.0f) + e));
}

template <typename T>
inline void silu_mul_row(const T* gate, const T* up, T* out, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    T rounded[kLanes];
    store(rounded, silu(load(gate + i)));
    store(out + i, load(rounded) * load(up + i));
  }
  if (i < count) {
    T rounded[kLanes] = {};
    store(rounded, silu(load_part(gate + i, count - i)));
    store_part(out + i, load(rounded) * load_part(up + i, count - i), count - i);
  }
}

inline void silu_mul(const SiluMulArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(a.rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(a.gate_up) + row * a.stride;
        silu_mul_row(gate, gate + a.columns, static_cast<T*>(a.out) + row * a.columns, a.columns);
      }
    });
  });
}

}  // namespace portalm::PORTALM_ISA
