// kv_write: rotate a step's queries and keys by their positions and scatter keys and values into
// their slots of one layer's cache. With rotary_dim 0 it only scatters.
//
//   query [T, H, D], key and value [T, H_kv, D]   the heads of a token contiguous; token stride
//   given query_out [T, H, D]                           contiguous; must not overlap `query`
//   slots, positions  int32 [T]                   pad tokens write to block 0, which is never read
//
// Mapping:  one thread per vector of 8 elements: token (x), then all vectors of its query heads,
//           keys and values (y). Rotating one half of a head needs the other half, which another
//           thread writes: both threads read both halves, so query_out must not overlap query.
// Bound by: memory: moves 2 * T * (H + 2 H_kv) * D elements. With one token: launch latency.
// Needs:    D, rotary_dim / 2 (interleaved: rotary_dim) and all strides in multiples of 8 elements.
// Meaning:  Backend.rope, then Backend.kv_write.
// Tested:   tests/gpu/test_native.py, test_native_compiled.py
#pragma once

#include "gpu_compat.h"

namespace portalm {

// Load and rotate 8 elements of a head from element `index` on: Su et al., "RoFormer", 2021.
template <typename T>
__device__ inline void load_rotated(const KvWriteArgs& a, const void* head, int index,
                                    const float* turns, float (&x)[kVector]) {
  T::unpack(load(vector_at(head, index)), x);
  if (index >= a.rotary_dim) return;
  const int half = a.rotary_dim / 2;
  if (a.is_interleaved) {
    for (int i = 0; i < kVector; i += 2) {
      const float cos = turns[(index + i) / 2], sin = turns[half + (index + i) / 2];
      const float first = x[i], second = x[i + 1];
      x[i] = first * cos - second * sin;
      x[i + 1] = second * cos + first * sin;
    }
    return;
  }
  const bool is_first = index < half;
  float other[kVector];
  T::unpack(load(vector_at(head, is_first ? index + half : index - half)), other);
  turns += is_first ? index : index - half;
  for (int i = 0; i < kVector; ++i)
    x[i] = x[i] * turns[i] + other[i] * (is_first ? -turns[half + i] : turns[half + i]);
}

// T: dtype of query, key, value and cache.
template <typename T>
__device__ void kv_write(const KvWriteArgs& a) {
  const int64_t token = block_x();
  const int per_head = a.head_size / kVector;
  const int vector = block_y() * kWriteThreads + thread_index();
  const int head = vector / per_head, index = vector % per_head * kVector;
  if (head >= a.num_heads + 2 * a.num_kv_heads) return;

  const float* turns =
      a.rotary_dim ? a.cos_sin + int64_t{a.positions[token]} * a.rotary_dim : nullptr;
  float x[kVector];
  if (head < a.num_heads) {
    const int64_t place = int64_t{head} * a.head_size;
    load_rotated<T>(a, vector_at(a.query, token * a.query_stride + place), index, turns, x);
    const int64_t row = token * a.num_heads * a.head_size;
    store(vector_at(a.query_out, row + place + index), T::pack(x));
    return;
  }

  const bool is_key = head < a.num_heads + a.num_kv_heads;
  const int kv_head = head - a.num_heads - (is_key ? 0 : a.num_kv_heads);
  const int64_t place = int64_t{kv_head} * a.head_size;
  if (is_key) {
    load_rotated<T>(a, vector_at(a.key, token * a.key_stride + place), index, turns, x);
  } else {
    T::unpack(load(vector_at(a.value, token * a.value_stride + place + index)), x);
  }
  const uint32_t slot = a.slots[token], block_size = a.cache.block_size;
  const int64_t at = slot / block_size * a.cache.block_stride +
                     slot % block_size * a.cache.token_stride + kv_head * a.cache.head_stride;
  void* const layer = const_cast<void*>(is_key ? a.cache.key : a.cache.value);
  store(vector_at(layer, at + index), T::pack(x));
}

}  // namespace portalm
