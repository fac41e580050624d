// linear: out[r, n] = sum over k of x[r, k] * weight[n, k], plus bias[n]; float32 inside.
//
//   weight   [N, K] packed into panels of kPanel rows, so that one load reads the same k of many
//            rows of the weight: panel p is [K][kPanel]; bfloat16 is stored in pairs of k,
//            [K / 2][kPanel][2], which widen with one instruction per vector (and are the operands
//            of bfloat16 dot products)
//   x        [rows, K] float32, bfloat16 or float16, widened once per call into tiles of
//            [K][rows of the tile]
//   out      [rows, N]
//   Quantized weights: linear_quantized.h.
//
// Mapping:  the team shares the panels; a register tile is kTileRows rows of x by one panel. With
//           few rows a tile spans several panels, so that enough sums are in flight; with many rows
//           a panel is widened once for all of them.
// Bound by: memory up to about 8 rows (each weight is read once), multiply-adds from about 32 on.
// Meaning:  every sum runs over k in order in one accumulator, whatever the tile: a row's result
//           does not depend on how many rows there are, bit for bit.
// Tested:   tests/unit/test_cpu_kernels.py; speed: benchmarks/kernels/linear.py
#pragma once

#include "parallel.h"
#include "scratch.h"

namespace portalm::PORTALM_ISA {

constexpr int kPanel = 2 * kLanes;
#if defined(PORTALM_EMULATED)
constexpr int kTileRows = 4;  // the same code, faster to compile
#else
constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // 2 accumulators per row fill the registers
#endif

// Whether the two elements of a pair of k are adjacent in a panel.
template <typename W>
constexpr bool kInPairs = false;
template <>
constexpr bool kInPairs<bf16> = true;

// Whether one instruction multiplies and sums bfloat16 pairs, x being bfloat16 as well. The sums
// are float32, but the instruction has its own rounding (and flushes denormals): results differ
// from those of other instruction sets, and are the same for all tiles.
#if defined(__AVX512BF16__) && PORTALM_LANES == 16
constexpr bool kDotsPairs = true;
PORTALM_INLINE Vec dot_pairs(Vec sums, VecU w, VecU x) {
  return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)w);
}
#else
#if defined(PORTALM_EMULATED)
constexpr bool kDotsPairs = true;  // to test this path on CPUs without the instruction
#else
constexpr bool kDotsPairs = false;
#endif
PORTALM_INLINE Vec dot_pairs(Vec sums, VecU w, VecU x) {
  sums += __builtin_bit_cast(Vec, x << 16) * __builtin_bit_cast(Vec, w << 16);
  return sums + __builtin_bit_cast(Vec, x & 0xFFFF0000) * __builtin_bit_cast(Vec, w & 0xFFFF0000);
}
#endif

// An element of a tile of x: float32, or a pair of bfloat16 for the dot product.
struct Pair {
  uint32_t bits;
};
template <typename X>
constexpr bool kIsPair = false;
template <>
constexpr bool kIsPair<Pair> = true;

// Floats of x that are widened at a time: half of a core's second-level cache.
constexpr int64_t kBlockFloats = 64 * 1024;

// Rows cut into as few tiles as possible, of nearly equal size: a small tile would leave the
// multipliers idle.
struct Tiles {
  PORTALM_INLINE explicit Tiles(int64_t num_rows)
      : count((num_rows + kTileRows - 1) / kTileRows),
        base(num_rows / max_of<int64_t>(count, 1)),
        num_larger(num_rows - base * count) {}
  PORTALM_INLINE int64_t first(int64_t t) const { return t * base + min_of(t, num_larger); }
  PORTALM_INLINE int64_t rows(int64_t t) const { return base + (t < num_larger ? 1 : 0); }
  PORTALM_INLINE int64_t holding(int64_t row) const {
    const int64_t in_larger = num_larger * (base + 1);
    return row < in_larger ? row / (base + 1) : num_larger + (row - in_larger) / base;
  }
  int64_t count, base, num_larger;
};

// K rounded up to whole pairs.
template <typename W>
PORTALM_INLINE int64_t padded_k(int64_t k) {
  return kInPairs<W> ? (k + 1) / 2 * 2 : k;
}

// Index of column `k` of row `j` within a panel.
template <typename W>
PORTALM_INLINE int64_t in_panel(int64_t k, int64_t j) {
  return kInPairs<W> ? (k / 2 * kPanel + j) * 2 + k % 2 : k * kPanel + j;
}

template <typename W>
inline int64_t packed_bytes_of(int64_t n, int64_t k) {
  return (n + kPanel - 1) / kPanel * padded_k<W>(k) * kPanel * static_cast<int64_t>(sizeof(W));
}

template <typename W>
inline void pack_as(const PackArgs& a) {
  const W* source = static_cast<const W*>(a.source);
  W* packed = static_cast<W*>(a.packed);
  const int64_t padded = padded_k<W>(a.k);
  parallel_for((a.n + kPanel - 1) / kPanel, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      W* panel = packed + p * padded * kPanel;
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t row = p * kPanel + j;
        for (int64_t k = 0; k < padded; ++k)
          panel[in_panel<W>(k, j)] = row < a.n && k < a.k ? source[row * a.k + k] : W{};
      }
    }
  });
}

// Both vectors of a panel at one k, or at a pair of k.
struct PanelRow {
  Vec low, high;
};
template <typename W>
PORTALM_INLINE PanelRow panel_row(const W* at) {
  return {load(at), load(at + kLanes)};
}
struct PanelPair {
  PanelRow first, second;
};
PORTALM_INLINE PanelPair panel_pair(const bf16* at) {
  VecU low, high;
  memcpy(&low, at, sizeof low);
  memcpy(&high, at + kPanel, sizeof high);
  return {{__builtin_bit_cast(Vec, low << 16), __builtin_bit_cast(Vec, high << 16)},
          {__builtin_bit_cast(Vec, low & 0xFFFF0000), __builtin_bit_cast(Vec, high & 0xFFFF0000)}};
}

// Multiply a tile of R rows of x, [K][R] (pairs: [K / 2][R]), by P panels: sums[R][P][kPanel].
template <int R, int P, typename W, typename X>
PORTALM_INLINE void tile(const X* x, const W* panel, int64_t k_size, float* sums) {
  Vec acc[R][P][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) acc[r][p][0] = acc[r][p][1] = splat(0.0f);
  const auto add = [&](int p, PanelRow w, const X* at) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if constexpr (!kIsPair<X>) {
        const Vec xr = splat(at[r]);
        acc[r][p][0] += xr * w.low;
        acc[r][p][1] += xr * w.high;
      }
    }
  };
  const int64_t panel_size = k_size * kPanel;
  if constexpr (kIsPair<X>) {
    for (int64_t k = 0; k < k_size; k += 2) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const W* at = panel + p * panel_size + k * kPanel;
        for (int line = 0; line < 2 * kPanel; line += 32)
          __builtin_prefetch(at + line + (R <= 2 ? 2048 : panel_size), 0, 3);
        VecU low, high;
        memcpy(&low, at, sizeof low);
        memcpy(&high, at + kPanel, sizeof high);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const VecU xr = x[k / 2 * R + r].bits - VecU{};
          acc[r][p][0] = dot_pairs(acc[r][p][0], low, xr);
          acc[r][p][1] = dot_pairs(acc[r][p][1], high, xr);
        }
      }
    }
  } else if constexpr (kInPairs<W>) {
    for (int64_t k = 0; k < k_size; k += 2) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const W* at = panel + p * panel_size + k * kPanel;
        __builtin_prefetch(at + (R <= 2 ? 1024 : panel_size), 0, 3);  // R > 2: the next panel
        add(p, panel_pair(at).first, x + k * R);
        asm volatile("" ::: "memory");  // read the second half again: registers are scarce
        add(p, panel_pair(at).second, x + k * R + R);
      }
    }
  } else {
    for (int64_t k = 0; k < k_size; ++k) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const W* at = panel + p * panel_size + k * kPanel;
        if (R <= 2) __builtin_prefetch(at + 2048 / sizeof(W), 0, 3);
        add(p, panel_row(at), x + k * R);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      store(sums + (r * P + p) * kPanel, acc[r][p][0]);
      store(sums + (r * P + p) * kPanel + kLanes, acc[r][p][1]);
    }
}

// Add the bias to a tile's sums and store them to out.
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

// What a linear call works on in addition to its arguments.
template <typename X>
struct Wide {
  const X* x;         // the tiles of this block
  const float* bias;  // [N] or null
  int64_t row;        // of the block's first row
  int64_t k;          // padded
};

// Multiply the tile of R rows at row `r` of the block by panels [begin, end), P at a time. Not
// inlined, as it needs all registers.
template <int R, int P, typename W, typename X>
__attribute__((noinline)) void tile_by_panels_of(const LinearArgs& a, const Wide<X>& wide,
                                                 int64_t r, const W* packed, int64_t begin,
                                                 int64_t end) {
  float sums[R * P * kPanel];
  int64_t p = begin;
  for (; p + P <= end; p += P) {
    tile<R, P>(wide.x + r * wide.k / (kIsPair<X> ? 2 : 1), packed + (p - begin) * wide.k * kPanel,
               wide.k, sums);
    finish(a, wide.bias, sums, wide.row + r, R, p * kPanel, P * kPanel);
  }
  if constexpr (P > 1) {
    if (p < end)
      tile_by_panels_of<R, 1, W, X>(a, wide, r, packed + (p - begin) * wide.k * kPanel, p, end);
  }
}

// Panels per tile, so that about 8 to 12 sums are in flight.
constexpr int panels_for(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// Multiply a tile of `num_rows` rows (1 to R) by panels [begin, end).
template <int R, typename W, typename X>
inline void tile_by_panels(const LinearArgs& a, const Wide<X>& wide, int64_t r, int64_t num_rows,
                           const W* packed, int64_t begin, int64_t end) {
  if (num_rows == R) {
    tile_by_panels_of<R, panels_for(R), W, X>(a, wide, r, packed, begin, end);
  } else if constexpr (R > 1) {
    tile_by_panels<R - 1, W, X>(a, wide, r, num_rows, packed, begin, end);
  }
}

// Multiply all rows of the block by panels [begin, end).
template <typename W, typename X>
inline void rows_by_panels(const LinearArgs& a, const Wide<X>& wide, int64_t num_rows,
                           const W* packed, int64_t begin, int64_t end) {
  const Tiles tiles(num_rows);
  for (int64_t t = 0; t < tiles.count; ++t)
    tile_by_panels<kTileRows, W, X>(a, wide, tiles.first(t), tiles.rows(t), packed, begin, end);
}

// Widen a panel to float32, [K][kPanel].
PORTALM_INLINE void widen_panel(const bf16* panel, float* wide, int64_t k_size) {
  for (int64_t k = 0; k < k_size; k += 2) {
    __builtin_prefetch(panel + (k_size + k) * kPanel, 0, 3);  // the next panel
    const PanelPair pair = panel_pair(panel + k * kPanel);
    store(wide + k * kPanel, pair.first.low);
    store(wide + k * kPanel + kLanes, pair.first.high);
    store(wide + (k + 1) * kPanel, pair.second.low);
    store(wide + (k + 1) * kPanel + kLanes, pair.second.high);
  }
}
PORTALM_INLINE void widen_panel(const fp16* panel, float* wide, int64_t k_size) {
  for (int64_t i = 0; i < k_size * kPanel; i += kLanes) store(wide + i, load(panel + i));
}
PORTALM_INLINE void widen_panel(const float*, float*, int64_t) {}

// Panels per piece of the team's work: about 64 KiB of weights, small enough to share evenly, large
// enough to stream.
PORTALM_INLINE int64_t panel_grain(int64_t panels, int64_t panel_bytes) {
  int64_t grain = max_of<int64_t>(64 * 1024 / max_of<int64_t>(panel_bytes, 1) / 4 * 4, 4);
  while (grain > 1 && panels < 8 * grain) grain /= 2;
  return grain;
}

template <typename W, typename X>
inline void linear_block(const LinearArgs& a, const Wide<X>& wide, int64_t num_rows) {
  const int64_t panels = (a.n + kPanel - 1) / kPanel, panel_size = wide.k * kPanel;
  const W* packed = static_cast<const W*>(a.packed);
  const int64_t grain = panel_grain(panels, panel_size * static_cast<int64_t>(sizeof(W)));
  parallel_for(panels, grain, [&](int64_t begin, int64_t end) {
    if (num_rows <= kTileRows) {
      rows_by_panels(a, wide, num_rows, packed + begin * panel_size, begin, end);
      return;
    }
    for (int64_t p = begin; p < end; ++p) {  // a panel stays in the cache for all its tiles
      const W* panel = packed + p * panel_size;
      if constexpr (sizeof(W) < sizeof(float) && !kIsPair<X>) {
        if (num_rows > 8 * kTileRows) {
          float* wide_panel = scratch<1>(panel_size);
          widen_panel(panel, wide_panel, wide.k);
          rows_by_panels<float, X>(a, wide, num_rows, wide_panel, p, p + 1);
          continue;
        }
      }
      rows_by_panels(a, wide, num_rows, panel, p, p + 1);
    }
  });
}

// Widen rows of x into float32 tiles of [K][R], with zeros where K is padded.
template <typename X>
inline void widen_rows(const X* x, int64_t stride, int64_t k_size, int64_t padded, int64_t begin,
                       int64_t num_rows, int64_t all_rows, float* tiles) {
  const Tiles shape(all_rows);
  for (int64_t r = begin; r < begin + num_rows; ++r) {
    const int64_t tile = shape.holding(r), first = shape.first(tile), width = shape.rows(tile);
    float* to = tiles + first * padded + (r - first);
    const X* from = x + r * stride;
    if (width == 1) {
      int64_t k = 0;
      for (; k + kLanes <= k_size; k += kLanes) store(to + k, load(from + k));
      for (; k < k_size; ++k) to[k] = to_float(from[k]);
    } else {
      for (int64_t k = 0; k < k_size; ++k) to[k * width] = to_float(from[k]);
    }
    for (int64_t k = k_size; k < padded; ++k) to[k * width] = 0;
  }
}

// The same for bfloat16 dot products: tiles of pairs, [K / 2][R].
inline void pair_rows(const bf16* x, int64_t stride, int64_t k_size, int64_t padded, int64_t begin,
                      int64_t num_rows, int64_t all_rows, Pair* tiles) {
  const Tiles shape(all_rows);
  for (int64_t r = begin; r < begin + num_rows; ++r) {
    const int64_t tile = shape.holding(r), first = shape.first(tile), width = shape.rows(tile);
    Pair* to = tiles + first * padded / 2 + (r - first);
    const bf16* from = x + r * stride;
    for (int64_t k = 0; k < padded; k += 2) {
      const uint32_t second = k + 1 < k_size ? from[k + 1].bits : 0;
      to[k / 2 * width].bits = from[k].bits | second << 16;
    }
  }
}

template <typename W, typename X>
inline void linear_over(const LinearArgs& a) {
  const int64_t element = kDTypeBytes[static_cast<int>(a.x_dtype)], padded = padded_k<W>(a.k);
  int64_t block = kBlockFloats / max_of<int64_t>(padded, 1) / kTileRows * kTileRows;
  block = min_of(max_of<int64_t>(block, kTileRows), a.rows);
  float* memory = scratch(block * padded + (a.bias ? a.n : 0));
  X* x = reinterpret_cast<X*>(memory);
  float* bias = a.bias ? memory + block * padded : nullptr;
  if (bias)
    with_dtype(a.x_dtype, [&](auto t) {
      for (int64_t i = 0; i < a.n; ++i)
        bias[i] = to_float(static_cast<const decltype(t)*>(a.bias)[i]);
    });
  for (int64_t row = 0; row < a.rows; row += block) {
    const int64_t num_rows = min_of(block, a.rows - row);
    const char* from = static_cast<const char*>(a.x) + row * a.x_stride * element;
    parallel_for(num_rows, 2 * kTileRows, [&](int64_t begin, int64_t end) {
      if constexpr (kIsPair<X>) {
        pair_rows(reinterpret_cast<const bf16*>(from), a.x_stride, a.k, padded, begin, end - begin,
                  num_rows, x);
      } else {
        with_dtype(a.x_dtype, [&](auto t) {
          widen_rows(reinterpret_cast<const decltype(t)*>(from), a.x_stride, a.k, padded, begin,
                     end - begin, num_rows, x);
        });
      }
    });
    linear_block<W, X>(a, Wide<X>{x, bias, row, padded}, num_rows);
  }
}

template <typename W>
inline void linear_as(const LinearArgs& a) {
  if constexpr (kDotsPairs && kInPairs<W>) {
    if (a.x_dtype == DType::bf16) return linear_over<W, Pair>(a);
  }
  linear_over<W, float>(a);
}

}  // namespace portalm::PORTALM_ISA
