// linear: out[r, n] = sum over k of x[r, k] * weight[n, k], plus bias[n]; float32 inside.
//
//   weight   [N, K] packed into panels of kPanel rows: panel p holds [K][kPanel], so that one load
//            brings the same k of many rows of the weight, for one row of x and for many
//   x        [rows, K] float32, bfloat16 or float16; out [rows, N]
//
// Mapping:  the team shares the panels; a register tile is kTileRows rows of x by one panel. With
//           few rows several panels are worked on at once, so that enough sums are in flight.
// Bound by: memory up to about 8 rows (each weight is read once), multiply-adds from about 32 on.
// Meaning:  every sum runs over k in order in one accumulator, whatever the tile: a row's result
//           does not depend on how many rows there are, bit for bit.
// Tested:   tests/unit/test_cpu_kernels.py; speed: benchmarks/kernels/linear.py
#pragma once

#include "parallel.h"

namespace portalm::PORTALM_ISA {

constexpr int kPanel = 2 * kLanes;
constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // 2 accumulators a row, as registers allow

// Rows of x that are kept in float32 at a time: what half of a core's second-level cache holds.
constexpr int64_t kBlockFloats = 64 * 1024;

inline int64_t packed_bytes(DType dtype, int64_t n, int64_t k) {
  int64_t panels = (n + kPanel - 1) / kPanel;
  return panels * k * kPanel * kDTypeBytes[static_cast<int>(dtype)];
}

template <typename W>
inline void pack_as(const PackArgs& a) {
  const W* source = static_cast<const W*>(a.source);
  W* packed = static_cast<W*>(a.packed);
  parallel_for((a.n + kPanel - 1) / kPanel, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      W* panel = packed + p * a.k * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) {
        int64_t row = p * kPanel + j;
        if (row < a.n) {
          for (int64_t k = 0; k < a.k; ++k) panel[k * kPanel + j] = source[row * a.k + k];
        } else {
          for (int64_t k = 0; k < a.k; ++k) panel[k * kPanel + j] = W{};
        }
      }
    }
  });
}

inline void pack(const PackArgs& a) {
  with_dtype(a.dtype, [&](auto w) { pack_as<decltype(w)>(a); });
}

// Sums of R rows of x (float32, x_stride apart) and P panels, into sums[R][P][kPanel].
template <int R, int P, typename W>
PORTALM_INLINE void tile(const float* x, int64_t x_stride, const W* panel, int64_t k_size,
                         float* sums) {
  Vec acc[R][P][2] = {};
  const int64_t panel_size = k_size * kPanel;
  for (int64_t k = 0; k < k_size; ++k) {
    Vec w[P][2];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const W* at = panel + p * panel_size + k * kPanel;
      if (R == 1) __builtin_prefetch(at + 1024 / sizeof(W), 0, 3);
      w[p][0] = load(at);
      w[p][1] = load(at + kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec xr = splat(x[r * x_stride + k]);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        acc[r][p][0] += xr * w[p][0];
        acc[r][p][1] += xr * w[p][1];
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p)
      for (int half = 0; half < 2; ++half)
        store(sums + (r * P + p) * kPanel + half * kLanes, acc[r][p][half]);
}

// A tile's sums, bias added, as out.
PORTALM_INLINE void finish(const LinearArgs& a, const float* bias, const float* sums, int64_t row,
                           int64_t num_rows, int64_t column, int64_t width) {
  const int64_t count = min_of(width, a.n - column);
  with_dtype(a.out_dtype, [&](auto dtype) {
    using O = decltype(dtype);
    for (int64_t r = 0; r < num_rows; ++r) {
      O* out = static_cast<O*>(a.out) + (row + r) * a.out_stride + column;
      const float* from = sums + r * width;
      int64_t j = 0;
      for (; j + kLanes <= count; j += kLanes) {
        Vec value = load(from + j);
        if (bias) value += load(bias + column + j);
        store(out + j, value);
      }
      for (; j < count; ++j) put(out + j, from[j] + (bias ? bias[column + j] : 0.0f));
    }
  });
}

// What one linear call works on besides its arguments.
struct Wide {
  const float* x;     // [rows of this block, K]
  const float* bias;  // [N] or null
  int64_t row;        // of the block's first row
};

// R rows of the block, from `r` on, by panels [begin, end), P at a time.
template <int R, int P, typename W>
inline void rows_by_panels(const LinearArgs& a, const Wide& wide, int64_t r, int64_t begin,
                           int64_t end) {
  float sums[R * P * kPanel];
  const W* packed = static_cast<const W*>(a.packed);
  int64_t p = begin;
  for (; p + P <= end; p += P) {
    tile<R, P>(wide.x + r * a.k, a.k, packed + p * a.k * kPanel, a.k, sums);
    finish(a, wide.bias, sums, wide.row + r, R, p * kPanel, P * kPanel);
  }
  if constexpr (P > 1) {
    if (p < end) rows_by_panels<R, 1, W>(a, wide, r, p, end);
  }
}

// Panels at a time, so that about 8 to 12 sums are in flight.
constexpr int panels_for(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// `num_rows` rows, 0 to R.
template <int R, typename W>
inline void leftover(const LinearArgs& a, const Wide& wide, int64_t r, int64_t num_rows,
                     int64_t begin, int64_t end) {
  if (num_rows == R) {
    rows_by_panels<R, panels_for(R), W>(a, wide, r, begin, end);
  } else if constexpr (R > 1) {
    leftover<R - 1, W>(a, wide, r, num_rows, begin, end);
  }
}

template <typename X>
inline void widen(const X* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// Scratch of the calling thread, grown when needed.
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

template <typename W>
inline void linear_block(const LinearArgs& a, const Wide& wide, int64_t num_rows) {
  const int64_t panels = (a.n + kPanel - 1) / kPanel;
  // some 64 KiB of weights a piece: small enough to share evenly, large enough to stream
  const int64_t panel_bytes = max_of<int64_t>(a.k * kPanel * static_cast<int64_t>(sizeof(W)), 1);
  int64_t grain = max_of<int64_t>(64 * 1024 / panel_bytes / 4 * 4, 4);
  while (grain > 1 && panels < 8 * grain) grain /= 2;
  parallel_for(panels, grain, [&](int64_t begin, int64_t end) {
    if (num_rows < kTileRows) {
      leftover<kTileRows - 1, W>(a, wide, 0, num_rows, begin, end);
      return;
    }
    for (int64_t p = begin; p < end; ++p) {  // a panel stays in the cache for all its tiles
      int64_t r = 0;
      for (; r + kTileRows <= num_rows; r += kTileRows)
        rows_by_panels<kTileRows, 1, W>(a, wide, r, p, p + 1);
      leftover<kTileRows - 1, W>(a, wide, r, num_rows - r, p, p + 1);
    }
  });
}

inline void linear(const LinearArgs& a) {
  const int64_t element = kDTypeBytes[static_cast<int>(a.x_dtype)];
  int64_t block = kBlockFloats / max_of<int64_t>(a.k, 1) / kTileRows * kTileRows;
  block = min_of(max_of<int64_t>(block, kTileRows), a.rows);
  float* x = scratch(block * a.k + (a.bias ? a.n : 0));
  float* bias = a.bias ? x + block * a.k : nullptr;
  if (bias) with_dtype(a.x_dtype, [&](auto t) { widen(static_cast<const decltype(t)*>(a.bias), bias, a.n); });
  for (int64_t row = 0; row < a.rows; row += block) {
    const int64_t num_rows = min_of(block, a.rows - row);
    const char* from = static_cast<const char*>(a.x) + row * a.x_stride * element;
    with_dtype(a.x_dtype, [&](auto t) {
      using X = decltype(t);
      for (int64_t r = 0; r < num_rows; ++r)
        widen(reinterpret_cast<const X*>(from) + r * a.x_stride, x + r * a.k, a.k);
    });
    const Wide wide{x, bias, row};
    with_dtype(a.w_dtype, [&](auto w) { linear_block<decltype(w)>(a, wide, num_rows); });
  }
}

}  // namespace portalm::PORTALM_ISA
