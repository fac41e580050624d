// rope: rotary position embedding of query and key, computed in float32.
//
//   query, key   [T, H, D] and [T, H_kv, D]; outputs contiguous
//   cos_sin      float32 [max_position, rotary_dim]: cosines, then sines
//
// Mapping:  the team shares the tokens.
// Bound by: memory.
// Meaning:  TorchBackend.rope of portalm_backends.portable.
// Tested:   tests/unit/test_cpu_kernels.py
#pragma once

#include "parallel.h"

namespace portalm::PORTALM_ISA {

template <typename T>
inline void rotate_head(const T* x, T* out, const float* cos, const float* sin, int64_t head_size,
                        int64_t rotary_dim, bool is_interleaved) {
  const int64_t half = rotary_dim / 2;
  if (is_interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
      put(out + 2 * i, a * cos[i] - b * sin[i]);
      put(out + 2 * i + 1, b * cos[i] + a * sin[i]);
    }
  } else {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
      store(out + i, a * c - b * s);
      store(out + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
      const float a = to_float(x[i]), b = to_float(x[half + i]);
      put(out + i, a * cos[i] - b * sin[i]);
      put(out + half + i, b * cos[i] + a * sin[i]);
    }
  }
  for (int64_t i = rotary_dim; i < head_size; ++i) out[i] = x[i];
}

inline void rope(const RopeArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(a.tokens, 8, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const float* cos = a.cos_sin + a.positions[token] * a.rotary_dim;
        const float* sin = cos + a.rotary_dim / 2;
        const T* query = static_cast<const T*>(a.query) + token * a.query_stride;
        const T* key = static_cast<const T*>(a.key) + token * a.key_stride;
        T* query_out = static_cast<T*>(a.query_out) + token * a.heads * a.head_size;
        T* key_out = static_cast<T*>(a.key_out) + token * a.kv_heads * a.head_size;
        for (int64_t h = 0; h < a.heads; ++h)
          rotate_head(query + h * a.head_size, query_out + h * a.head_size, cos, sin, a.head_size,
                      a.rotary_dim, a.is_interleaved);
        for (int64_t h = 0; h < a.kv_heads; ++h)
          rotate_head(key + h * a.head_size, key_out + h * a.head_size, cos, sin, a.head_size,
                      a.rotary_dim, a.is_interleaved);
      }
    });
  });
}

}  // namespace portalm::PORTALM_ISA
