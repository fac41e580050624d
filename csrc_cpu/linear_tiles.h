// linear for bfloat16 with matrix tiles (Intel AMX): out as in linear.h, over the same packed
// weights.
//
//   weight   panels of 32 rows in pairs of k, [K / 2][32][2]: 16 pairs by 16 rows of it are the
//            right operand of a tile product
//   x        [rows, K], bfloat16, copied once per call into rows padded with zeros, in blocks of 16
//
// Mapping:  the team shares the panels; two tiles of 16 rows of x by the two halves of a panel, so
//           that each loaded tile is used in two products.
// Bound by: memory up to about 100 rows.
// Meaning:  every sum runs over k in order in one tile, whatever the number of rows: a row's result
//           does not depend on the batch, bit for bit. (Other CPUs differ in the last bits.)
// Tested:   tests/unit/test_cpu_linear.py, with tiles in plain C++ (isa emulated_amx); on a CPU
//           with AMX the same tests run for isa amx.
// Source:   Intel 64 and IA-32 Architectures SDM, volume 1, chapter 18.
#pragma once

#include "linear.h"

#if PORTALM_LANES == 16 && (defined(__AVX512BF16__) || defined(PORTALM_EMULATED))
#define PORTALM_HAS_TILES 1

namespace portalm::PORTALM_ISA {

constexpr int64_t kTileSide = 16;             // rows, and 32-bit columns
constexpr int64_t kTileDepth = 32;            // of k
constexpr int64_t kPanelStride = 4 * kPanel;  // bytes from one pair of k to the next

#if defined(PORTALM_EMULATED)
struct TileFile {
  uint32_t lanes[8][kTileSide][kTileSide];
};
inline TileFile& tile_file() {
  static thread_local TileFile file;
  return file;
}
inline void configure_tiles() { memset(&tile_file(), 0xFF, sizeof(TileFile)); }
inline void release_tiles() {}
template <int T>
inline void zero_tile() {
  memset(tile_file().lanes[T], 0, sizeof tile_file().lanes[T]);
}
template <int T>
inline void load_tile(const void* from, int64_t stride) {
  for (int64_t r = 0; r < kTileSide; ++r)
    memcpy(tile_file().lanes[T][r], static_cast<const char*>(from) + r * stride, 64);
}
template <int T>
inline void store_tile(void* to, int64_t stride) {
  for (int64_t r = 0; r < kTileSide; ++r)
    memcpy(static_cast<char*>(to) + r * stride, tile_file().lanes[T][r], 64);
}
template <int C, int A, int B>
inline void multiply_tiles() {
  TileFile& f = tile_file();
  for (int64_t m = 0; m < kTileSide; ++m)
    for (int64_t k = 0; k < kTileSide; ++k)
      for (int64_t n = 0; n < kTileSide; ++n) {
        float sum = __builtin_bit_cast(float, f.lanes[C][m][n]);
        for (int half = 0; half < 2; ++half) {
          const int shift = half ? 0 : 16;
          const uint32_t x = f.lanes[A][m][k] << shift & 0xFFFF0000;
          const uint32_t w = f.lanes[B][k][n] << shift & 0xFFFF0000;
          sum += __builtin_bit_cast(float, x) * __builtin_bit_cast(float, w);
        }
        f.lanes[C][m][n] = __builtin_bit_cast(uint32_t, sum);
      }
}
#else
// assembly, as GCC's intrinsics need the tile's number as a literal
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" : : "m"(config));
}
inline void release_tiles() { asm volatile("tilerelease"); }
template <int T>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(stride) : "memory");
}
template <int C, int A, int B>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
#endif

// Multiply 16 rows of x (32 if Two) by a panel: sums[32][kPanel]. `rest` holds the panel's last
// pairs of k, padded with zeros, or is null.
template <bool Two>
inline void panel_by_tiles(const bf16* x, int64_t x_stride, const bf16* panel, int64_t num_whole,
                           const bf16* rest, float* sums) {
  zero_tile<0>();
  zero_tile<1>();
  if constexpr (Two) {
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t step = 0; step < num_whole + (rest ? 1 : 0); ++step) {
    const bf16* w = step < num_whole ? panel + step * kTileDepth * kPanel : rest;
    load_tile<6>(w, kPanelStride);
    load_tile<7>(w + kPanel, kPanelStride);
    load_tile<4>(x + step * kTileDepth, x_stride * 2);
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    if constexpr (Two) {
      load_tile<5>(x + kTileSide * x_stride + step * kTileDepth, x_stride * 2);
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(sums, kPanel * 4);
  store_tile<1>(sums + kTileSide, kPanel * 4);
  if constexpr (Two) {
    store_tile<2>(sums + kTileSide * kPanel, kPanel * 4);
    store_tile<3>(sums + kTileSide * kPanel + kTileSide, kPanel * 4);
  }
}

inline void panels_by_tiles(const LinearArgs& a, const bf16* x, int64_t x_stride, const float* bias,
                            int64_t begin, int64_t end) {
  alignas(64) float sums[2 * kTileSide * kPanel];
  alignas(64) bf16 rest[kTileDepth * kPanel];
  const int64_t padded = padded_k<bf16>(a.k), num_whole = padded / kTileDepth;
  const int64_t left = (padded - num_whole * kTileDepth) * kPanel;
  configure_tiles();
  for (int64_t p = begin; p < end; ++p) {
    const bf16* panel = static_cast<const bf16*>(a.packed) + p * padded * kPanel;
    if (left) {
      memset(rest, 0, sizeof rest);
      memcpy(rest, panel + num_whole * kTileDepth * kPanel,
             static_cast<size_t>(left) * sizeof(bf16));
    }
    for (int64_t row = 0; row < a.rows; row += 2 * kTileSide) {
      const int64_t num_rows = min_of(2 * kTileSide, a.rows - row);
      const bf16* from = x + row * x_stride;
      if (num_rows > kTileSide)
        panel_by_tiles<true>(from, x_stride, panel, num_whole, left ? rest : nullptr, sums);
      else panel_by_tiles<false>(from, x_stride, panel, num_whole, left ? rest : nullptr, sums);
      finish(a, bias, sums, row, num_rows, p * kPanel, kPanel);
    }
  }
  release_tiles();
}

inline void linear_by_tiles(const LinearArgs& a) {
  const int64_t stride = (a.k + kTileDepth - 1) / kTileDepth * kTileDepth;
  const int64_t rows = (a.rows + kTileSide - 1) / kTileSide * kTileSide;
  float* memory = scratch(rows * stride / 2 + (a.bias ? a.n : 0));
  bf16* x = reinterpret_cast<bf16*>(memory);
  float* bias = a.bias ? memory + rows * stride / 2 : nullptr;
  if (bias)
    for (int64_t i = 0; i < a.n; ++i) bias[i] = to_float(static_cast<const bf16*>(a.bias)[i]);
  parallel_for(rows, 2 * kTileSide, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t filled = r < a.rows ? a.k : 0;
      memcpy(x + r * stride, static_cast<const bf16*>(a.x) + min_of(r, a.rows - 1) * a.x_stride,
             static_cast<size_t>(filled) * sizeof(bf16));
      memset(x + r * stride + filled, 0, static_cast<size_t>(stride - filled) * sizeof(bf16));
    }
  });
  const int64_t panels = (a.n + kPanel - 1) / kPanel;
  const int64_t panel_bytes = padded_k<bf16>(a.k) * kPanel * static_cast<int64_t>(sizeof(bf16));
  parallel_for(panels, panel_grain(panels, panel_bytes), [&](int64_t begin, int64_t end) {
    panels_by_tiles(a, x, stride, bias, begin, end);
  });
}

}  // namespace portalm::PORTALM_ISA
#endif
