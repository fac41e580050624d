// linear with quantized weights: weight[n, k] = scale[n, g] * (code[n, k] - zero) + minimum[n, g]
// for groups g of k. Within a group, products are exact integers; they are scaled and added in
// float32.
//
//   weight   in the layout of quantized_formats.h
//   x        [rows, K], quantized once per call, for each row and group by its largest value
//
// Codes of 8 or 4 bits come from a checkpoint, or a weight is rounded to them; x has 8 bits, or 15
// (_x16) to reproduce the checkpoint's own values. On CPUs without bfloat16 dot products, bfloat16
// weights are handled as 14-bit integers (blocks) with 13-bit x: two instructions per pair of
// 16-bit products, where float32 takes four. Their scales are powers of two, so that a value is
// exact unless it is more than 16 times smaller than the largest of its group of 64
// (docs/adr/0006).
//
// Mapping:  as linear.h: the team shares panels, tiles of up to kTileRows rows share each load.
// Bound by: memory at few rows, integer products at many.
// Meaning:  ReferenceBackend.linear over the dequantized weight, except for the rounding of x. Sums
//           within a group are exact and groups are added in order: a row's result does not depend
//           on the batch, and instruction sets differ only in how multiply-adds round.
// Tested:   tests/unit/test_cpu_linear.py; speed: benchmarks/kernels/linear.py
#pragma once

#include "quantized_formats.h"

namespace portalm::PORTALM_ISA {

// -- products of integers ------------------------------------------------------------------------

typedef uint16_t VecH __attribute__((vector_size(4 * kLanes)));
typedef uint64_t VecL __attribute__((vector_size(4 * kLanes)));

// Add each lane's pair of 16-bit products to its 32-bit sum. With few registers, inline assembly
// keeps the compiler from computing all products before the first addition.
PORTALM_INLINE void add_pairs(VecI& sums, VecI w, VecI x) {
#if defined(__AVX512VNNI__) && PORTALM_LANES == 16
  sums = (VecI)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__) && PORTALM_LANES == 8
  sums = (VecI)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#elif defined(__AVX512BW__) && PORTALM_LANES == 16
  sums += (VecI)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__) && PORTALM_LANES == 8
  VecI products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(w), "x"(x));
#elif defined(__AVX2__) && PORTALM_LANES == 16
  __m256i a[2], b[2];
  memcpy(a, &w, sizeof w);
  memcpy(b, &x, sizeof x);
  for (int i = 0; i < 2; ++i) a[i] = _mm256_madd_epi16(a[i], b[i]);
  VecI products;
  memcpy(&products, a, sizeof products);
  sums += products;
#elif defined(__SSE2__) && PORTALM_LANES == 4
  sums += (VecI)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
  const VecI low = ((w << 16) >> 16) * ((x << 16) >> 16);
  sums += low + (w >> 16) * (x >> 16);
#endif
}

// The `i`-th code of each unit of a vector.
template <Format F>
PORTALM_INLINE VecI codes_of(VecI units, int i) {
  constexpr int bits = kShape<F>.bits, unit = kUnitBits<F>;
  if constexpr (bits == unit) {
    return units;
  } else if constexpr (unit == 16) {
    VecH wide = (VecH)units;
    if (i + 1 == kCodesInUnit<F>) return (VecI)(wide >> (unit - bits));
    if (i) wide >>= i * bits;
    return (VecI)(wide & static_cast<uint16_t>((1 << bits) - 1));
  } else {
    static_assert(bits == 4);
    return (i ? units >> 4 : units) & 0x0F0F0F0F;
  }
}

// Sums over quads of unsigned codes times signed x, for one group: up to 8 quads of 4-bit codes, or
// of 8-bit codes if kHasQuads.
#if defined(__AVX512VNNI__) && PORTALM_LANES == 16
struct QuadSums {
  VecI sums{};
  PORTALM_INLINE void add(VecI w, VecI x) {
    sums = (VecI)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
  }
  PORTALM_INLINE VecI total() const { return sums; }
};
#elif defined(__AVXVNNI__) && PORTALM_LANES == 8
struct QuadSums {
  VecI sums{};
  PORTALM_INLINE void add(VecI w, VecI x) {
    sums = (VecI)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
  }
  PORTALM_INLINE VecI total() const { return sums; }
};
#elif defined(__AVX512BW__) && PORTALM_LANES == 16
struct QuadSums {  // 16 bits hold 8 quads of 4-bit codes: 8 * 2 * 15 * 127 < 2^15
  VecI sums{};
  PORTALM_INLINE void add(VecI w, VecI x) {
    sums = (VecI)_mm512_add_epi16((__m512i)sums, _mm512_maddubs_epi16((__m512i)w, (__m512i)x));
  }
  PORTALM_INLINE VecI total() const {
    return (VecI)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1));
  }
};
#elif defined(__AVX2__) && PORTALM_LANES == 8
struct QuadSums {  // as above
  VecI sums{};
  PORTALM_INLINE void add(VecI w, VecI x) {
    VecI products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
        : "+x"(sums), "=&x"(products)
        : "x"(w), "x"(x));
  }
  PORTALM_INLINE VecI total() const {
    return (VecI)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
  }
};
#else
struct QuadSums {
  VecI sums{};
  PORTALM_INLINE void add(VecI w, VecI x) {
    for (int i = 0; i < 4; ++i) {
      const int shift = 24 - 8 * i;
      sums += __builtin_bit_cast(VecI, (__builtin_bit_cast(VecU, w << shift) >> 24)) *
              ((x << shift) >> 24);
    }
  }
  PORTALM_INLINE VecI total() const { return sums; }
};
#endif

struct PairSums {
  VecI sums{};
  PORTALM_INLINE void add(VecI w, VecI x) { add_pairs(sums, w, x); }
  PORTALM_INLINE VecI total() const { return sums; }
};
template <bool Condition, typename A, typename B>
struct Choose {
  using Type = A;
};
template <typename A, typename B>
struct Choose<false, A, B> {
  using Type = B;
};

PORTALM_INLINE VecI splat_bits(int32_t x) { return x - VecI{}; }
PORTALM_INLINE VecI load_bits(const uint8_t* p) {
  VecI x;
  memcpy(&x, p, sizeof x);
  return x;
}

// -- rounding x ----------------------------------------------------------------------------------

// The quantized x of a block, in tiles: codes [groups][G / step][rows] in 32-bit lanes, and for
// each group and row a scale and the correction for the weights' zero or minimum.
template <Format F>
struct RoundedTiles {
  // of a whole block of rows, in 32-bit units
  PORTALM_INLINE static int64_t size(int64_t rows, int64_t groups) {
    return rows * groups * (kLanesOfGroup<F> + 2);
  }
  int32_t* codes;   // a tile begins at first * groups * kLanesOfGroup
  float* scales;    // a tile begins at first * groups: [groups][rows]
  int32_t* offset;  // as scales: sum of the codes, times the weight's zero without minimums
};

template <Format F, typename X>
inline void round_row(const RoundedTiles<F>& to, const X* x, int64_t k_size, int64_t first,
                      int64_t r, int64_t rows) {
  constexpr FormatShape shape = kShape<F>;
  constexpr int64_t lanes = kLanesOfGroup<F>;
  const int64_t groups = num_groups<F>(k_size);
  int32_t* codes = to.codes + first * groups * lanes + r;
  float* scales = to.scales + first * groups + r;
  int32_t* offsets = to.offset + first * groups + r;
  for (int64_t g = 0; g < groups; ++g) {
    const Values<shape.group> values(x + g * shape.group, k_size - g * shape.group);
    const int32_t bits = values.largest_bits();
    const float largest = __builtin_bit_cast(float, bits);
    float scale, inverse;
    if constexpr (shape.x_bits == 7) {
      scale = largest / 127.0f;
      inverse = largest > 0 ? 127.0f / largest : 0.0f;
    } else {
      const PowerOfTwo power(largest, shape.x_bits);
      scale = power.scale;
      inverse = power.inverse;
    }
    VecI total_of{};
    int32_t* lane = codes + g * lanes * rows;
#pragma GCC unroll 16
    for (int64_t i = 0; i < values.count; ++i) {
      const VecI whole = values.whole(i, inverse);
      if constexpr (shape.zero || shape.has_minimum) total_of += whole;
      // lanes of 64 bits, each with a pair in its lower half
      const VecL both = (VecL)whole;
      if constexpr (kStep<F> == 2) {
        const VecL pairs = (both & 0xFFFF) | (both >> 16 & 0xFFFF0000);
        for (int l = 0; l < kLanes / 2; ++l)
          lane[(i * kLanes / 2 + l) * rows] = static_cast<int32_t>(pairs[l]);
      } else {
        const VecL pairs = (both & 0xFF) | (both >> 24 & 0xFF00);
        for (int l = 0; l < kLanes / 4; ++l)
          lane[(i * kLanes / 4 + l) * rows] =
              static_cast<int32_t>(pairs[2 * l] | pairs[2 * l + 1] << 16);
      }
    }
    // a NaN or an infinity has no code: a NaN scale makes every product NaN
    const bool is_finite = bits < kInfinityBits;
    scales[g * rows] = is_finite ? scale : __builtin_nanf("");
    int32_t total = 0;
    if (is_finite)
      for (int l = 0; l < kLanes; ++l) total += total_of[l];
    offsets[g * rows] = shape.has_minimum ? total : total * shape.zero;
  }
}

// Distance of prefetches in bytes with few rows, when memory is the limit.
constexpr int64_t kReadAhead = 2048;

// -- products ------------------------------------------------------------------------------------

// Multiply a tile of R rows of x by P panels: sums[R][P][kPanel].
template <int R, int P, Format F>
PORTALM_INLINE void quantized_tile(const int32_t* x, const float* scales, const int32_t* offsets,
                                   const uint8_t* panels, int64_t groups, float* sums) {
  constexpr FormatShape shape = kShape<F>;
  constexpr int64_t lanes = kLanesOfGroup<F>, lane_bytes = kLanes * 4;
  constexpr int64_t vectors = lanes / kCodesInUnit<F>;
  using Sums = typename Choose<kAsQuads<F>, QuadSums, PairSums>::Type;
  Vec total[R][P][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) total[r][p][0] = total[r][p][1] = splat(0.0f);
  const int64_t ahead = R <= 2 ? kReadAhead : groups * kGroupBytes<F>;  // R > 2: the next panel
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t* xg = x + g * lanes * R;
    const uint8_t* group = panels + g * kGroupBytes<F>;  // of the first panel
    const int64_t panel_bytes = groups * kGroupBytes<F>;
    Sums acc[R][P][2];
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = group + p * panel_bytes + kHeaderBytes<F> + v * 2 * lane_bytes;
        for (int64_t line = 0; line < 2 * lane_bytes; line += 64)
          __builtin_prefetch(at + ahead + line, 0, 3);
#pragma GCC unroll 4
        for (int i = 0; i < kCodesInUnit<F>; ++i) {
          const VecI low = codes_of<F>(load_bits(at), i);
          const VecI high = codes_of<F>(load_bits(at + lane_bytes), i);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const VecI xr = splat_bits(xg[(i * vectors + v) * R + r]);
            acc[r][p][0].add(low, xr);
            acc[r][p][1].add(high, xr);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Scale<F>* header = reinterpret_cast<const Scale<F>*>(group + p * panel_bytes);
      for (int64_t line = 0; line < kHeaderBytes<F>; line += 64)
        __builtin_prefetch(group + p * panel_bytes + ahead + line, 0, 3);
      const Vec scale[2] = {load(header), load(header + kLanes)};
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec xs = splat(scales[g * R + r]);
        const int32_t offset = offsets[g * R + r];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          VecI exact = acc[r][p][half].total();
          if (shape.zero) exact -= offset;
          Vec& sum = total[r][p][half];
          sum += __builtin_convertvector(exact, Vec) * xs * scale[half];
          if (shape.has_minimum)
            sum += load(header + kPanel + half * kLanes) * (xs * splat(static_cast<float>(offset)));
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
      for (int half = 0; half < 2; ++half)
        store(sums + (r * P + p) * kPanel + half * kLanes, total[r][p][half]);
}

template <Format F>
struct QuantizedBlock {
  RoundedTiles<F> x;
  const float* bias;
  int64_t row, groups;
};

// Multiply the tile of R rows at row `first` of the block by panels [begin, end), P at a time. Not
// inlined, as it needs all registers.
template <int R, int P, Format F>
__attribute__((noinline)) void quantized_tile_by(const LinearArgs& a,
                                                 const QuantizedBlock<F>& block, int64_t first,
                                                 int64_t begin, int64_t end) {
  float sums[R * P * kPanel];
  const int64_t at = first * block.groups;
  int64_t p = begin;
  for (; p + P <= end; p += P) {
    quantized_tile<R, P, F>(
        block.x.codes + at * kLanesOfGroup<F>, block.x.scales + at, block.x.offset + at,
        static_cast<const uint8_t*>(a.packed) + p * block.groups * kGroupBytes<F>, block.groups,
        sums);
    finish(a, block.bias, sums, block.row + first, R, p * kPanel, P * kPanel);
  }
  if constexpr (P > 1) {
    if (p < end) quantized_tile_by<R, 1, F>(a, block, first, p, end);
  }
}

// Multiply a tile of `num_rows` rows (1 to R) by panels [begin, end).
template <int R, Format F>
inline void quantized_tile_by_panels(const LinearArgs& a, const QuantizedBlock<F>& block,
                                     int64_t first, int64_t num_rows, int64_t begin, int64_t end) {
  if (num_rows == R) {
    quantized_tile_by<R, panels_for(R), F>(a, block, first, begin, end);
  } else if constexpr (R > 1) {
    quantized_tile_by_panels<R - 1, F>(a, block, first, num_rows, begin, end);
  }
}

template <Format F>
inline void quantized_linear_as(const LinearArgs& a) {
  const int64_t groups = num_groups<F>(a.k), element = kDTypeBytes[static_cast<int>(a.x_dtype)];
  int64_t rows = kStep<F> * kBlockFloats / max_of<int64_t>(a.k, 1) / kTileRows * kTileRows;
  rows = min_of(max_of<int64_t>(rows, kTileRows), a.rows);
  float* memory = scratch(RoundedTiles<F>::size(rows, groups) + (a.bias ? a.n : 0));
  RoundedTiles<F> x;
  x.codes = reinterpret_cast<int32_t*>(memory);
  x.scales = memory + rows * groups * kLanesOfGroup<F>;
  x.offset = reinterpret_cast<int32_t*>(x.scales + rows * groups);
  float* bias = a.bias ? x.scales + 2 * rows * groups : nullptr;
  if (bias)
    with_dtype(a.x_dtype, [&](auto t) {
      for (int64_t i = 0; i < a.n; ++i)
        bias[i] = to_float(static_cast<const decltype(t)*>(a.bias)[i]);
    });
  for (int64_t row = 0; row < a.rows; row += rows) {
    const int64_t num_rows = min_of(rows, a.rows - row);
    const Tiles tiles(num_rows);
    const char* from = static_cast<const char*>(a.x) + row * a.x_stride * element;
    with_dtype(a.x_dtype, [&](auto t) {
      using X = decltype(t);
      parallel_for(num_rows, 4, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t tile = tiles.holding(r), first = tiles.first(tile);
          round_row<F>(x, reinterpret_cast<const X*>(from) + r * a.x_stride, a.k, first, r - first,
                       tiles.rows(tile));
        }
      });
    });
    const QuantizedBlock<F> block{x, bias, row, groups};
    const int64_t panels = (a.n + kPanel - 1) / kPanel;
    parallel_for(panels, panel_grain(panels, groups * kGroupBytes<F>),
                 [&](int64_t begin, int64_t end) {
                   // one panel at a time, so that it stays in the cache for all its tiles
                   const int64_t at_once = tiles.count > 1 ? 1 : end - begin;
                   for (int64_t p = begin; p < end; p += at_once)
                     for (int64_t t = 0; t < tiles.count; ++t)
                       quantized_tile_by_panels<kTileRows, F>(a, block, tiles.first(t),
                                                              tiles.rows(t), p, p + at_once);
                 });
  }
}

// -- by format -----------------------------------------------------------------------------------

template <Format F>
struct Chosen {
  static constexpr Format format = F;
};
// Call `body` with the format used for `format` on this CPU: without products of quads, 8-bit x
// saves nothing.
template <typename Body>
PORTALM_INLINE void with_quantized(Format format, const Body& body) {
  switch (format) {
    case Format::q8: body(Chosen<kHasQuads ? Format::q8 : Format::q8_x16>{}); break;
    case Format::q4: body(Chosen<Format::q4>{}); break;
    case Format::q4_min: body(Chosen<Format::q4_min>{}); break;
    case Format::q8_x16: body(Chosen<Format::q8_x16>{}); break;
    case Format::q4_x16: body(Chosen<Format::q4_x16>{}); break;
    case Format::q4_min_x16: body(Chosen<Format::q4_min_x16>{}); break;
    case Format::q8_16_x16: body(Chosen<Format::q8_16_x16>{}); break;
    case Format::q8_min_x16: body(Chosen<Format::q8_min_x16>{}); break;
    case Format::q8_16_min_x16: body(Chosen<Format::q8_16_min_x16>{}); break;
    case Format::blocks:
      if constexpr (kAsBlocks) body(Chosen<Format::blocks>{});
      break;
    default: break;
  }
}

// The layout of a weight of this format on this CPU.
PORTALM_INLINE Format kept_as(Format format) {
  return !kAsBlocks && format == Format::blocks ? Format::bf16 : format;
}
PORTALM_INLINE bool is_quantized(Format format) { return format >= Format::q8; }

inline int64_t packed_bytes(Format format, int64_t n, int64_t k) {
  format = kept_as(format);
  int64_t bytes = 0;
  if (is_quantized(format))
    with_quantized(format, [&](auto f) { bytes = quantized_bytes<decltype(f)::format>(n, k); });
  else
    with_dtype(static_cast<DType>(format),
               [&](auto w) { bytes = packed_bytes_of<decltype(w)>(n, k); });
  return bytes;
}

inline void pack(const PackArgs& a) {
  const Format format = kept_as(a.format);
  if (is_quantized(format))
    with_quantized(format, [&](auto f) {
      with_dtype(a.dtype, [&](auto w) { quantize_as<decltype(f)::format, decltype(w)>(a); });
    });
  else with_dtype(a.dtype, [&](auto w) { pack_as<decltype(w)>(a); });
}

inline void pack_codes(const PackCodesArgs& a) {
  with_quantized(a.format, [&](auto f) {
    if constexpr (decltype(f)::format != Format::blocks) pack_codes_as<decltype(f)::format>(a);
  });
}

inline void linear(const LinearArgs& a) {
  const Format format = kept_as(a.format);
  if (is_quantized(format))
    with_quantized(format, [&](auto f) { quantized_linear_as<decltype(f)::format>(a); });
  else with_dtype(static_cast<DType>(format), [&](auto w) { linear_as<decltype(w)>(a); });
}

}  // namespace portalm::PORTALM_ISA
