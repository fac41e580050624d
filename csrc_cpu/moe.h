// moe: apply to each token its experts and sum the results by their routing weights.
//
//   x, out     [T, C]
//   ids        int32 [T, k], distinct within a row; shares float32 [T, k], the routing weights
//   experts    int64 [E, 4]: address and format of gate_up [2 I, C], gate rows first; the same of
//              down [C, I]
//   biases     [E, 2 I] and [E, C] in x's dtype, or null
//
// Mapping:  tokens are sorted by expert; for each expert, its rows are gathered and go through two
//           linears (the team shares their panels) with the activation between them.
// Bound by: memory with few rows per expert (its weights are read once), multiply-adds with many.
// Meaning:  TorchBackend.moe of portalm_backends.portable, with both products kept in float32. A
//           token's experts are added in order of expert, so its result does not depend on the
//           batch.
// Tested:   tests/unit/test_cpu_kernels.py; speed: benchmarks/kernels/layers.py
#pragma once

#include "parallel.h"
#include "scratch.h"
#include "silu_mul.h"

namespace portalm::PORTALM_ISA {

constexpr int64_t kExpertRows = 512;  // rows of an expert processed at a time

// The memory of one call, from a single allocation.
struct MoeMemory {
  float* sums;     // [T, C]
  int32_t* ends;   // [E]: end of an expert's pairs in `order`
  int32_t* order;  // [T k]: (token, choice) pairs, sorted by expert
  char* rows;      // [rows, C], then [rows, I], in x's dtype
  float* wide;     // [rows, 2 I], then [rows, C]
};

inline MoeMemory moe_memory(const MoeArgs& a, int64_t rows) {
  const auto padded = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  const int64_t sums = padded(a.tokens * a.hidden), ends = padded(a.num_experts);
  const int64_t order = padded(a.tokens * a.top_k);
  const int64_t narrow = padded(rows * max_of(a.hidden, a.inner));
  float* memory = scratch<2>(sums + ends + order + narrow + rows * max_of(2 * a.inner, a.hidden));
  float* rest = memory + sums + ends + order;
  return {memory, reinterpret_cast<int32_t*>(memory + sums),
          reinterpret_cast<int32_t*>(memory + sums + ends), reinterpret_cast<char*>(rest),
          rest + narrow};
}

// Fill `ends` and `order` with a counting sort.
inline void sort_by_expert(const MoeArgs& a, const MoeMemory& memory) {
  const int64_t pairs = a.tokens * a.top_k;
  int32_t* at = memory.ends;
  memset(at, 0, a.num_experts * sizeof *at);
  for (int64_t i = 0; i < pairs; ++i) ++at[a.ids[i]];
  int32_t begin = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) {  // begins, which the loop below moves to the ends
    const int32_t count = at[e];
    at[e] = begin;
    begin += count;
  }
  for (int64_t i = 0; i < pairs; ++i) memory.order[at[a.ids[i]]++] = static_cast<int32_t>(i);
}

// The activation between an expert's products, for one row: [2 I] to [I].
template <typename T>
inline void activate_row(const MoeArgs& a, const float* gate, T* out) {
  const float* up = gate + a.inner;
  const Vec limit = splat(a.limit), alpha = splat(a.alpha);
  const auto inner = [&](Vec g, Vec u) {
    if (a.limit <= 0) return silu(g) * u;
    g = select(g > limit, limit, g);  // keeps NaN
    u = select(u > limit, limit, select(u < -limit, -limit, u));
    return silu(alpha * g) / alpha * (u + splat(1.0f));
  };
  int64_t i = 0;
  for (; i + kLanes <= a.inner; i += kLanes) store(out + i, inner(load(gate + i), load(up + i)));
  if (i < a.inner) {
    const int64_t left = a.inner - i;
    store_part(out + i, inner(load_part(gate + i, left), load_part(up + i, left)), left);
  }
}

// Apply one expert to the rows of `pairs` [count] and add the results to `sums`.
template <typename T>
inline void one_expert(const MoeArgs& a, const MoeMemory& memory, int64_t expert,
                       const int32_t* pairs, int64_t count) {
  const int64_t* weights = a.experts + expert * 4;
  const auto bias = [&](const void* all, int64_t size) -> const void* {
    return all ? static_cast<const T*>(all) + expert * size : nullptr;
  };
  T* rows = reinterpret_cast<T*>(memory.rows);
  parallel_for(count, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      memcpy(rows + r * a.hidden, static_cast<const T*>(a.x) + pairs[r] / a.top_k * a.x_stride,
             a.hidden * sizeof(T));
  });
  kernels().linear({rows, a.dtype, count, a.hidden, reinterpret_cast<const void*>(weights[0]),
                    static_cast<Format>(weights[1]), 2 * a.inner, a.hidden,
                    bias(a.gate_up_bias, 2 * a.inner), memory.wide, DType::f32, 2 * a.inner});
  parallel_for(count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      activate_row(a, memory.wide + r * 2 * a.inner, rows + r * a.inner);
  });
  kernels().linear({rows, a.dtype, count, a.inner, reinterpret_cast<const void*>(weights[2]),
                    static_cast<Format>(weights[3]), a.hidden, a.inner, bias(a.down_bias, a.hidden),
                    memory.wide, DType::f32, a.hidden});
  parallel_for(count, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* sum = memory.sums + pairs[r] / a.top_k * a.hidden;
      const float* from = memory.wide + r * a.hidden;
      const float share = a.shares[pairs[r]];
      int64_t i = 0;
      for (; i + kLanes <= a.hidden; i += kLanes)
        store(sum + i, load(sum + i) + load(from + i) * splat(share));
      for (; i < a.hidden; ++i) sum[i] += from[i] * share;
    }
  });
}

inline void moe(const MoeArgs& a) {
  const MoeMemory memory = moe_memory(a, min_of(a.tokens, kExpertRows));
  sort_by_expert(a, memory);
  memset(memory.sums, 0, a.tokens * a.hidden * sizeof(float));
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t e = 0; e < a.num_experts; ++e) {
      const int64_t end = memory.ends[e];
      for (int64_t at = e ? memory.ends[e - 1] : 0; at < end; at += kExpertRows)
        one_expert<T>(a, memory, e, memory.order + at, min_of(kExpertRows, end - at));
    }
    parallel_for(a.tokens, 8, [&](int64_t begin, int64_t end) {
      T* out = static_cast<T*>(a.out);
      for (int64_t i = begin * a.hidden; i < end * a.hidden; ++i) put(out + i, memory.sums[i]);
    });
  });
}

}  // namespace portalm::PORTALM_ISA
