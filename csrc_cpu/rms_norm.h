// rms_norm: x / sqrt(mean(x^2) + eps), rounded to the dtype, times weight. With a residual, the sum
// x + residual is rounded to the dtype, stored in total, and normalized instead of x.
//
//   x, residual, out, total   [T, C]; weight [C]
//
// Mapping:  the team shares the rows.
// Bound by: memory.
// Meaning:  TorchBackend.rms_norm and add_rms_norm of portalm_backends.portable.
// Tested:   tests/unit/test_cpu_kernels.py
#pragma once

#include "parallel.h"

namespace portalm::PORTALM_ISA {

template <typename T>
inline void rms_norm_row(const NormArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* weight = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out) + row * a.columns;
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    T* total = static_cast<T*>(a.total) + row * a.columns;
    int64_t i = 0;
    for (; i + kLanes <= a.columns; i += kLanes) store(total + i, load(x + i) + load(residual + i));
    for (; i < a.columns; ++i) put(total + i, to_float(x[i]) + to_float(residual[i]));
    x = total;
  }
  Vec squares{};
  int64_t i = 0;
  for (; i + kLanes <= a.columns; i += kLanes) {
    Vec v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < a.columns; ++i) total += to_float(x[i]) * to_float(x[i]);
  const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(a.columns) + a.eps);
  for (i = 0; i + kLanes <= a.columns; i += kLanes) {
    T rounded[kLanes];
    store(rounded, load(x + i) * splat(scale));
    store(out + i, load(rounded) * load(weight + i));
  }
  for (; i < a.columns; ++i) {
    T rounded;
    put(&rounded, to_float(x[i]) * scale);
    put(out + i, to_float(rounded) * to_float(weight[i]));
  }
}

inline void rms_norm(const NormArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    parallel_for(a.rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) rms_norm_row<decltype(t)>(a, row);
    });
  });
}

}  // namespace portalm::PORTALM_ISA
