// kv_write, kv_copy, kv_wire: write to the paged KV cache, copy its blocks, export and import them.
//
//   cache   per layer, block and KV head: keys, then values, of B tokens
//             float32, float16   keys [D, B]          values [B, D]
//             bfloat16           keys [D / 2, B, 2]   values [B / 2, D, 2]
//           Keys are transposed: one load reads the same dimension of many tokens. bfloat16 is
//           stored in pairs that fill a 32-bit lane, which a shift and a mask widen to two vectors.
//             int8, float8       keys [D, B]          values [B, D]
//           then the scales of the B keys and of the B values, in bfloat16: a number is its code
//           times its token's scale (SCALED_KV_DTYPES in portalm.backend).
//           With shared values (floats only) there is one plane, in the layout of values.
//   wire    [N, L, 2, B, H_kv, D], the layout that all backends exchange, or [N, L, 1, ...] with
//           shared values; float32 for a cache of codes
//
// Mapping:  the team shares tokens, copies, or (block, layer) pairs. Bound by: memory.
// Needs:    slots and blocks within the cache; padding points into block 0, which is never read.
// Meaning:  ReferenceBackend.kv_write, kv_copy, kv_export and kv_import.
// Tested:   tests/unit/test_cpu_kernels.py
#pragma once

#include "parallel.h"

namespace portalm::PORTALM_ISA {

// Elements of one block's keys or values of one KV head.
PORTALM_INLINE int64_t head_elements(const KVShape& s) { return s.block_size * s.head_size; }

PORTALM_INLINE int64_t num_planes(const KVShape& s) { return s.shares_values ? 1 : 2; }

// Whether elements are 8-bit codes with a scale per token; the factor that `load` leaves out of a
// code's value; the largest value of a code.
template <typename K>
constexpr bool kIsCode = false;
template <>
inline constexpr bool kIsCode<i8> = true;
template <>
inline constexpr bool kIsCode<f8> = true;
template <typename K>
constexpr float kUnit = 1;
template <>
inline constexpr float kUnit<f8> = 256;
template <typename K>
constexpr float kLargestCode = 127;
template <>
inline constexpr float kLargestCode<f8> = 448;

// Element at which the keys, or the values, of a block and KV head begin.
template <typename K>
PORTALM_INLINE int64_t keys_at(const KVShape& s, int64_t block, int64_t head) {
  const int64_t scales = kIsCode<K> ? 2 * s.block_size * sizeof(bf16) : 0;
  return (block * s.kv_heads + head) * (num_planes(s) * head_elements(s) + scales);
}
template <typename K>
PORTALM_INLINE int64_t values_at(const KVShape& s, int64_t block, int64_t head) {
  return keys_at<K>(s, block, head) + (num_planes(s) - 1) * head_elements(s);
}

// The scales of a block's keys, followed by those of its values.
template <typename K>
PORTALM_INLINE bf16* scales_of(K* keys, const KVShape& s) {
  return reinterpret_cast<bf16*>(keys + 2 * head_elements(s));
}
template <typename K>
PORTALM_INLINE const bf16* scales_of(const K* keys, const KVShape& s) {
  return reinterpret_cast<const bf16*>(keys + 2 * head_elements(s));
}

// Adjacent elements that share a 32-bit lane.
template <typename K>
constexpr int kPack = 1;
template <>
inline constexpr int kPack<bf16> = 2;

// Index of dimension `d` of token `b` within a block's keys, and within its values.
template <typename K>
PORTALM_INLINE int64_t key_at(const KVShape& s, int64_t d, int64_t b) {
  return (d / kPack<K> * s.block_size + b) * kPack<K> + d % kPack<K>;
}
template <typename K>
PORTALM_INLINE int64_t value_at(const KVShape& s, int64_t b, int64_t d) {
  return (b / kPack<K> * s.head_size + d) * kPack<K> + b % kPack<K>;
}

// The scale of `count` numbers. A code is the number times `inverse`; all are 0 if `inverse` is 0.
template <typename K>
struct VectorScale {
  bf16 scale;
  float inverse;

  template <typename T>
  PORTALM_INLINE static VectorScale of(const T* x, int64_t count) {
    VecI most{};  // absolute values compare like their bits, with NaN above all
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec v = i + kLanes <= count ? load(x + i) : load_part(x + i, count - i);
      most = max_of(most, __builtin_bit_cast(VecI, v) & 0x7FFFFFFF);
    }
    VectorScale s{};
    put(&s.scale, __builtin_bit_cast(float, max_lane(most)) * (1 / kLargestCode<K>));
    const float scale = to_float(s.scale);
    if (!(scale < __builtin_inff())) {
      s.scale.bits = 0x7FC0;  // NaN
    } else if (scale < 0x1p-100f) {
      s.scale.bits = 0;
    } else {
      s.inverse = 1 / scale;
    }
    return s;
  }

  PORTALM_INLINE void put_code(K* p, float x) const { put(p, inverse == 0 ? 0.0f : x * inverse); }
};

template <typename K, typename T>
inline void write_codes(K* cache, const KVShape& s, const T* key, const T* value, int64_t slot) {
  const int64_t block = slot / s.block_size, offset = slot % s.block_size;
  for (int64_t h = 0; h < s.kv_heads; ++h) {
    K* keys = cache + keys_at<K>(s, block, h);
    K* values = keys + head_elements(s);
    bf16* scales = scales_of(keys, s);
    const T* k = key + h * s.head_size;
    const T* v = value + h * s.head_size;
    const auto of_keys = VectorScale<K>::of(k, s.head_size);
    const auto of_values = VectorScale<K>::of(v, s.head_size);
    for (int64_t d = 0; d < s.head_size; ++d)
      of_keys.put_code(keys + key_at<K>(s, d, offset), to_float(k[d]));
    for (int64_t d = 0; d < s.head_size; ++d)
      of_values.put_code(values + value_at<K>(s, offset, d), to_float(v[d]));
    scales[offset] = of_keys.scale;
    scales[s.block_size + offset] = of_values.scale;
  }
}

template <typename K, typename T>
inline void write_token(K* cache, const KVShape& s, const T* key, const T* value, int64_t slot) {
  const int64_t block = slot / s.block_size, offset = slot % s.block_size;
  for (int64_t h = 0; h < s.kv_heads; ++h) {
    const T* k = key + h * s.head_size;
    const T* v = s.shares_values ? k : value + h * s.head_size;
    if (!s.shares_values) {
      K* keys = cache + keys_at<K>(s, block, h);
      for (int64_t d = 0; d < s.head_size; ++d) put(keys + key_at<K>(s, d, offset), to_float(k[d]));
    }
    K* values = cache + values_at<K>(s, block, h);
    for (int64_t d = 0; d < s.head_size; ++d)
      put(values + value_at<K>(s, offset, d), to_float(v[d]));
  }
}

inline void kv_write(const KVWriteArgs& a) {
  with_kv_dtype(a.shape.dtype, [&](auto c) {
    with_dtype(a.dtype, [&](auto t) {
      using K = decltype(c);
      using T = decltype(t);
      parallel_for(a.tokens, 16, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
          // padding is not written: it is never read, and threads would race for its slot
          if (a.slots[token] < a.shape.block_size) continue;
          const T* key = static_cast<const T*>(a.key) + token * a.key_stride;
          const T* value = static_cast<const T*>(a.value) + token * a.value_stride;
          if constexpr (kIsCode<K>)
            write_codes(static_cast<K*>(a.cache), a.shape, key, value, a.slots[token]);
          else write_token(static_cast<K*>(a.cache), a.shape, key, value, a.slots[token]);
        }
      });
    });
  });
}

inline void kv_copy(const KVCopyArgs& a) {
  parallel_for(a.num_layers * a.num_copies, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* layer = a.cache + i / a.num_copies * a.layer_bytes;
      const int64_t copy = i % a.num_copies;
      memcpy(layer + a.destination[copy] * a.block_bytes, layer + a.source[copy] * a.block_bytes,
             a.block_bytes);
    }
  });
}

template <typename K>
inline void wire_block(const KVWireArgs& a, int64_t index, int64_t layer) {
  const KVShape& s = a.shape;
  K* cache = reinterpret_cast<K*>(a.cache + layer * a.layer_bytes);
  const int64_t side = s.block_size * s.kv_heads * s.head_size;
  const auto move = [&](K& inside, K& outside) {
    if (a.is_export) outside = inside;
    else inside = outside;
  };
  K* wire = static_cast<K*>(a.wire) + (index * a.num_layers + layer) * num_planes(s) * side;
  for (int64_t h = 0; h < s.kv_heads; ++h) {
    K* keys = cache + keys_at<K>(s, a.blocks[index], h);
    K* values = cache + values_at<K>(s, a.blocks[index], h);
    for (int64_t b = 0; b < s.block_size; ++b) {
      K* wire_key = wire + (b * s.kv_heads + h) * s.head_size;
      K* wire_value = wire_key + (num_planes(s) - 1) * side;
      for (int64_t d = 0; d < s.head_size; ++d) {
        if (!s.shares_values) move(keys[key_at<K>(s, d, b)], wire_key[d]);
        move(values[value_at<K>(s, b, d)], wire_value[d]);
      }
    }
  }
}

// The same for codes: exports the numbers that they represent, and imports numbers like new tokens.
template <typename K>
inline void wire_codes(const KVWireArgs& a, int64_t index, int64_t layer) {
  const KVShape& s = a.shape;
  K* cache = reinterpret_cast<K*>(a.cache + layer * a.layer_bytes);
  const int64_t token = s.kv_heads * s.head_size, side = s.block_size * token;
  float* wire = static_cast<float*>(a.wire) + (index * a.num_layers + layer) * 2 * side;
  for (int64_t b = 0; b < s.block_size; ++b, wire += token) {
    if (!a.is_export) {
      write_codes(cache, s, wire, wire + side, a.blocks[index] * s.block_size + b);
      continue;
    }
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const K* keys = cache + keys_at<K>(s, a.blocks[index], h);
      const K* values = keys + head_elements(s);
      const bf16* scales = scales_of(keys, s);
      const float key_scale = to_float(scales[b]), value_scale = to_float(scales[s.block_size + b]);
      float* to = wire + h * s.head_size;
      for (int64_t d = 0; d < s.head_size; ++d) {
        to[d] = to_float(keys[key_at<K>(s, d, b)]) * key_scale;
        to[side + d] = to_float(values[value_at<K>(s, b, d)]) * value_scale;
      }
    }
  }
}

inline void kv_wire(const KVWireArgs& a) {
  with_kv_dtype(a.shape.dtype, [&](auto c) {
    using K = decltype(c);
    parallel_for(a.num_wire_blocks * a.num_layers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if constexpr (kIsCode<K>) wire_codes<K>(a, i / a.num_layers, i % a.num_layers);
        else wire_block<K>(a, i / a.num_layers, i % a.num_layers);
      }
    });
  });
}

}  // namespace portalm::PORTALM_ISA
