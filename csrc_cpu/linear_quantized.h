// linear over weights of 8 or 4 bits: weight[n, k] = scale[n, g] * (code[n, k] - zero) + minimum[n, g]
// for groups g of k; products are sums of 8-bit integers, exact, scaled and added in float32.
//
//   weight   panels of kPanel rows; for each group the float16 scales of the panel's rows, their
//            minimums where the format has them, then the codes: as pairs [G / 2][kPanel][2] or
//            quads [G / 4][kPanel][4] of k, whichever the CPU multiplies; of 4 bits, one byte holds
//            a code of the first half of the group's quads (low) and of the second half (high)
//   x        [rows, K], rounded to 8 bits for each row and group by its largest value; once a call
//
// Mapping:  as linear.h: the team shares panels, tiles of up to kTileRows rows share each load.
// Bound by: memory at few rows, 8-bit products at many.
// Meaning:  as ReferenceBackend.linear over the dequantised weight, but for the rounding of x. Within
//           a group sums are exact, groups are added in order: a row's result does not depend on
//           the batch, and is the same on every instruction set but for how multiply-adds round.
// Tested:   tests/unit/test_cpu_quantized.py; speed: benchmarks/kernels/linear.py --formats
#pragma once

#include "linear.h"

namespace portalm::PORTALM_ISA {

struct FormatShape {
  int64_t group;  // values of k with one scale
  int bits;
  int zero;  // code of 0, where there is no minimum
  bool has_minimum;
};
constexpr FormatShape kFormats[] = {
    {32, 8, 128, false},  // Format::q8
    {32, 4, 8, false},    // Format::q4
    {32, 4, 0, true},     // Format::q4_min
    {16, 8, 128, false},  // Format::q8_16
};
template <Format F>
constexpr FormatShape kShape = kFormats[static_cast<int>(F) - static_cast<int>(Format::q8)];

// -- products of 8-bit integers ------------------------------------------------------------------

#if defined(__AVX512VNNI__) && PORTALM_LANES == 16
constexpr bool kHasQuads = true;  // 8-bit codes are multiplied four at a time
#else
constexpr bool kHasQuads = false;
#endif

template <Format F>
constexpr bool kAsQuads = kShape<F>.bits == 4 || kHasQuads;
template <Format F>
constexpr int64_t kStep = kAsQuads<F> ? 4 : 2;  // values of k in one 32-bit lane

typedef uint8_t HalfBytes __attribute__((vector_size(2 * kLanes)));

// Sums over lanes' pairs of 16-bit products, added to 32-bit sums.
PORTALM_INLINE VecI add_pairs(VecI sums, VecI w, VecI x) {
#if defined(__AVX512BW__) && PORTALM_LANES == 16
  return sums + (VecI)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__) && PORTALM_LANES == 8
  return sums + (VecI)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__AVX2__) && PORTALM_LANES == 16
  __m256i a[2], b[2];
  memcpy(a, &w, sizeof w);
  memcpy(b, &x, sizeof x);
  for (int i = 0; i < 2; ++i) a[i] = _mm256_madd_epi16(a[i], b[i]);
  VecI products;
  memcpy(&products, a, sizeof products);
  return sums + products;
#elif defined(__SSE2__) && PORTALM_LANES == 4
  return sums + (VecI)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
  const VecI low = ((w << 16) >> 16) * ((x << 16) >> 16);
  return sums + low + (w >> 16) * (x >> 16);
#endif
}

// Codes of 8 bits as 16-bit numbers.
PORTALM_INLINE VecI widen_codes(const uint8_t* codes) {
#if defined(__AVX512BW__) && PORTALM_LANES == 16
  return (VecI)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
#elif defined(__AVX2__) && PORTALM_LANES == 8
  return (VecI)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes));
#else
  HalfBytes narrow;
  memcpy(&narrow, codes, sizeof narrow);
  typedef uint16_t Wide16 __attribute__((vector_size(4 * kLanes)));
  return __builtin_bit_cast(VecI, __builtin_convertvector(narrow, Wide16));
#endif
}

// Sums over quads of unsigned codes times signed x, for one group: up to 8 quads of 4-bit codes, or
// (where the CPU has an instruction for it) of 8-bit ones.
#if defined(__AVX512VNNI__) && PORTALM_LANES == 16
struct QuadSums {
  VecI sums{};
  PORTALM_INLINE void add(VecI w, VecI x) {
    sums = (VecI)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
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
    sums = (VecI)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
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

PORTALM_INLINE VecI splat_bits(int32_t x) { return x - VecI{}; }
PORTALM_INLINE VecI load_bits(const uint8_t* p) {
  VecI x;
  memcpy(&x, p, sizeof x);
  return x;
}

// -- the layout ----------------------------------------------------------------------------------

template <Format F>
constexpr int64_t kHeaderBytes = kPanel * 2 * (kShape<F>.has_minimum ? 2 : 1);
template <Format F>
constexpr int64_t kGroupBytes = kHeaderBytes<F> + kPanel * kShape<F>.group * kShape<F>.bits / 8;

template <Format F>
PORTALM_INLINE int64_t num_groups(int64_t k) {
  return (k + kShape<F>.group - 1) / kShape<F>.group;
}

// Row `j` of a panel: its codes, scales and minimums of every group.
template <Format F>
inline void place_row(uint8_t* panel, int64_t j, const uint8_t* codes, const float* scales,
                      const float* minimums, int64_t k_size) {
  constexpr FormatShape shape = kShape<F>;
  for (int64_t g = 0; g < num_groups<F>(k_size); ++g) {
    uint8_t* group = panel + g * kGroupBytes<F>;
    fp16* header = reinterpret_cast<fp16*>(group);
    put(header + j, scales[g]);
    if (shape.has_minimum) put(header + kPanel + j, minimums[g]);
    uint8_t* to = group + kHeaderBytes<F>;
    for (int64_t i = 0; i < shape.group; ++i) {
      const int64_t k = g * shape.group + i;
      const uint8_t code = k < k_size ? codes[k] : 0;
      const int64_t at = i / kStep<F> * kPanel * kStep<F> + j * kStep<F> + i % kStep<F>;
      if (shape.bits == 8) {
        to[at] = code;
      } else {  // the second half of the group above the first
        const int64_t half = kPanel * shape.group / 2;
        if (at < half) to[at] = code;
        else to[at - half] = static_cast<uint8_t>(to[at - half] | code << 4);
      }
    }
  }
}

template <Format F>
inline int64_t quantized_bytes(int64_t n, int64_t k) {
  return (n + kPanel - 1) / kPanel * num_groups<F>(k) * kGroupBytes<F>;
}

// Codes, scales and minimums that a checkpoint came with.
template <Format F>
inline void pack_codes_as(const PackCodesArgs& a) {
  const int64_t groups = num_groups<F>(a.k), panel_bytes = groups * kGroupBytes<F>;
  parallel_for((a.n + kPanel - 1) / kPanel, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = static_cast<uint8_t*>(a.packed) + p * panel_bytes;
      memset(panel, 0, panel_bytes);
      for (int64_t j = 0; j < kPanel && p * kPanel + j < a.n; ++j) {
        const int64_t row = p * kPanel + j;
        place_row<F>(panel, j, a.codes + row * a.k, a.scales + row * groups,
                     a.minimums ? a.minimums + row * groups : nullptr, a.k);
      }
    }
  });
}

// -- rounding weights ----------------------------------------------------------------------------

PORTALM_INLINE float as_fp16(float x) {
  fp16 narrow;
  put(&narrow, x);
  return to_float(narrow);
}
PORTALM_INLINE int32_t rounded(float x) {  // to nearest, ties to even; |x| < 2^22
  return static_cast<int32_t>((x + 12582912.0f) - 12582912.0f);
}

// Codes of one group for a scale and a minimum; the sum of the squared errors.
PORTALM_INLINE float round_group(const float* w, int64_t count, float scale, float minimum,
                                 int largest, uint8_t* codes) {
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  float error = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float exact = (w[i] - minimum) * inverse;
    const int32_t code = rounded(min_of(max_of(exact, 0.0f), static_cast<float>(largest)));
    codes[i] = static_cast<uint8_t>(code);
    const float off = minimum + scale * static_cast<float>(code) - w[i];
    error += off * off;
  }
  return error;
}

// The scale (and minimum) of a group. Of 8 bits the largest value sets it; of 4 bits a few ranges
// around that are tried, and the one of the least squared error is taken.
template <Format F>
inline void choose_group(const float* w, int64_t count, uint8_t* codes, float* scale,
                         float* minimum) {
  constexpr FormatShape shape = kShape<F>;
  constexpr int largest = (1 << shape.bits) - 1;
  float low = w[0], high = w[0];
  for (int64_t i = 1; i < count; ++i) {
    low = min_of(low, w[i]);
    high = max_of(high, w[i]);
  }
  float best = __builtin_inff();
  uint8_t trial[64];
  constexpr int kTrials = shape.bits == 8 ? 1 : 16;
  for (int t = 0; t < kTrials; ++t) {
    const float shrink = 1.0f - 0.02f * static_cast<float>(t);
    float s, m;
    if (shape.has_minimum) {
      m = as_fp16(low * shrink);
      s = as_fp16(max_of(high * shrink - m, 0.0f) / largest);
    } else {
      // codes of 8 bits reach as far down as up
      const float down = static_cast<float>(shape.bits == 8 ? shape.zero - 1 : shape.zero);
      s = as_fp16(max_of(high / (largest - shape.zero), -low / down) * shrink);
      m = -s * static_cast<float>(shape.zero);
    }
    const float error = round_group(w, count, s, m, largest, trial);
    if (error < best) {
      best = error;
      memcpy(codes, trial, static_cast<size_t>(count));
      *scale = s;
      *minimum = m;
    }
  }
}

template <Format F, typename W>
inline void quantize_as(const PackArgs& a) {
  constexpr int64_t kGroup = kShape<F>.group;
  const int64_t groups = num_groups<F>(a.k), panel_bytes = groups * kGroupBytes<F>;
  parallel_for((a.n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    float* scales = scratch(2 * groups + groups * kGroup);
    float* minimums = scales + groups;
    uint8_t* codes = reinterpret_cast<uint8_t*>(minimums + groups);
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = static_cast<uint8_t*>(a.packed) + p * panel_bytes;
      memset(panel, 0, panel_bytes);
      for (int64_t j = 0; j < kPanel && p * kPanel + j < a.n; ++j) {
        const W* row = static_cast<const W*>(a.source) + (p * kPanel + j) * a.k;
        for (int64_t g = 0; g < groups; ++g) {
          float w[kGroup] = {};
          const int64_t count = min_of(kGroup, a.k - g * kGroup);
          for (int64_t i = 0; i < count; ++i) w[i] = to_float(row[g * kGroup + i]);
          choose_group<F>(w, count, codes + g * kGroup, scales + g, minimums + g);
        }
        place_row<F>(panel, j, codes, scales, minimums, a.k);
      }
    }
  });
}

// -- rounding x ----------------------------------------------------------------------------------

// x of a block as tiles: codes [groups][G / step][rows] in 32-bit lanes, and for each group and row
// the scale and what the codes' sum takes away or adds.
template <Format F>
struct RoundedTiles {
  static constexpr int64_t kLanesOf = kShape<F>.group / kStep<F>;
  // in 32-bit units, of a whole block of rows
  PORTALM_INLINE static int64_t size(int64_t rows, int64_t groups) {
    return rows * groups * (kLanesOf + 2);
  }
  int32_t* codes;   // of a tile at first * groups * kLanesOf
  float* scales;    // of a tile at first * groups: [groups][rows]
  int32_t* offset;  // the same: zero * sum of the codes
};

template <Format F, typename X>
inline void round_row(const RoundedTiles<F>& to, const X* x, int64_t k_size, int64_t first,
                      int64_t r, int64_t rows) {
  constexpr int64_t kGroup = kShape<F>.group, lanes = RoundedTiles<F>::kLanesOf;
  const int64_t groups = num_groups<F>(k_size);
  int32_t* codes = to.codes + first * groups * lanes;
  float* scales = to.scales + first * groups;
  int32_t* offsets = to.offset + first * groups;
  for (int64_t g = 0; g < groups; ++g) {
    float v[kGroup];
    const int64_t count = min_of(kGroup, k_size - g * kGroup);
    if (count == kGroup) {
      for (int64_t i = 0; i < kGroup; i += kLanes) store(v + i, load(x + g * kGroup + i));
    } else {
      for (int64_t i = 0; i < kGroup; ++i) v[i] = i < count ? to_float(x[g * kGroup + i]) : 0.0f;
    }
    Vec largest_of{};
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const Vec one = load(v + i);
      largest_of = max_of(largest_of, select(one < splat(0.0f), -one, one));
    }
    const float largest = max_lane(largest_of);
    const float scale = largest / 127.0f;
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    int32_t code[kGroup];
    int32_t total = 0;
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const Vec magic = splat(12582912.0f);
      const VecI whole =
          __builtin_convertvector((load(v + i) * splat(inverse) + magic) - magic, VecI);
      memcpy(code + i, &whole, sizeof whole);
      for (int l = 0; l < kLanes; ++l) total += whole[l];
    }
    int32_t* lane = codes + g * lanes * rows + r;
    for (int64_t i = 0; i < lanes; ++i) {
      uint32_t bits = 0;
      if constexpr (kStep<F> == 4) {
        for (int b = 0; b < 4; ++b) bits |= (static_cast<uint32_t>(code[4 * i + b]) & 0xFF) << 8 * b;
      } else {
        for (int b = 0; b < 2; ++b)
          bits |= (static_cast<uint32_t>(code[2 * i + b]) & 0xFFFF) << 16 * b;
      }
      lane[i * rows] = static_cast<int32_t>(bits);
    }
    // a NaN or an infinity has no code: it shows in the scale and so in every product
    const bool is_finite = largest - largest == 0;
    float check = 0;
    for (int64_t i = 0; i < kGroup; ++i) check += v[i] * 0.0f;
    scales[g * rows + r] = is_finite && check == 0 ? scale : __builtin_nanf("");
    offsets[g * rows + r] = kShape<F>.has_minimum ? total : total * kShape<F>.zero;
  }
}

// -- products ------------------------------------------------------------------------------------

// Sums of a tile of R rows of x and one panel, into sums[R][kPanel].
template <int R, Format F>
PORTALM_INLINE void quantized_tile(const int32_t* x, const float* scales, const int32_t* offsets,
                                   const uint8_t* panel, int64_t groups, float* sums) {
  constexpr FormatShape shape = kShape<F>;
  constexpr int64_t lanes = RoundedTiles<F>::kLanesOf;
  constexpr int64_t lane_bytes = kLanes * 4;
  Vec total[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = splat(0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* group = panel + g * kGroupBytes<F>;
    const uint8_t* codes = group + kHeaderBytes<F>;
    const int32_t* xg = x + g * lanes * R;
    for (int64_t line = 0; line < kGroupBytes<F>; line += 64)
      __builtin_prefetch(group + (R <= 2 ? 4096 : groups * kGroupBytes<F>) + line, 0, 3);
    VecI whole[R][2];
    if constexpr (kAsQuads<F>) {
      QuadSums acc[R][2];
      if constexpr (shape.bits == 4) {
        const VecI mask = splat_bits(0x0F0F0F0F);
#pragma GCC unroll 8
        for (int64_t i = 0; i < lanes / 2; ++i) {
          const VecI low = load_bits(codes + i * 2 * lane_bytes);
          const VecI high = load_bits(codes + (i * 2 + 1) * lane_bytes);
          const VecI w[2][2] = {{low & mask, high & mask}, {(low >> 4) & mask, (high >> 4) & mask}};
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
              const VecI xr = splat_bits(xg[(i + half * lanes / 2) * R + r]);
              acc[r][0].add(w[half][0], xr);
              acc[r][1].add(w[half][1], xr);
            }
        }
      } else {
#pragma GCC unroll 8
        for (int64_t i = 0; i < lanes; ++i) {
          const VecI low = load_bits(codes + i * 2 * lane_bytes);
          const VecI high = load_bits(codes + (i * 2 + 1) * lane_bytes);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const VecI xr = splat_bits(xg[i * R + r]);
            acc[r][0].add(low, xr);
            acc[r][1].add(high, xr);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half) whole[r][half] = acc[r][half].total();
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) whole[r][0] = whole[r][1] = VecI{};
#pragma GCC unroll 4
      for (int64_t i = 0; i < lanes; ++i) {
        const VecI low = widen_codes(codes + i * lane_bytes);
        const VecI high = widen_codes(codes + i * lane_bytes + lane_bytes / 2);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const VecI xr = splat_bits(xg[i * R + r]);
          whole[r][0] = add_pairs(whole[r][0], low, xr);
          whole[r][1] = add_pairs(whole[r][1], high, xr);
        }
      }
    }
    const fp16* header = reinterpret_cast<const fp16*>(group);
    const Vec scale[2] = {load(header), load(header + kLanes)};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec xs = splat(scales[g * R + r]);
      const int32_t offset = offsets[g * R + r];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        VecI exact = whole[r][half];
        if (!shape.has_minimum) exact -= offset;
        const Vec product = __builtin_convertvector(exact, Vec) * xs;
        total[r][half] += product * scale[half];
        if (shape.has_minimum)
          total[r][half] += load(header + kPanel + half * kLanes) *
                            (xs * splat(static_cast<float>(offset)));
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int half = 0; half < 2; ++half) store(sums + r * kPanel + half * kLanes, total[r][half]);
}

template <Format F>
struct QuantizedBlock {
  RoundedTiles<F> x;
  const float* bias;
  int64_t row, groups;
};

template <int R, Format F>
inline void quantized_tile_by_panels(const LinearArgs& a, const QuantizedBlock<F>& block,
                                     int64_t first, int64_t num_rows, int64_t begin, int64_t end) {
  if (num_rows == R) {
    float sums[R * kPanel];
    const int64_t at = first * block.groups;
    for (int64_t p = begin; p < end; ++p) {
      quantized_tile<R, F>(
          block.x.codes + at * RoundedTiles<F>::kLanesOf, block.x.scales + at, block.x.offset + at,
          static_cast<const uint8_t*>(a.packed) + p * block.groups * kGroupBytes<F>, block.groups,
          sums);
      finish(a, block.bias, sums, block.row + first, R, p * kPanel, kPanel);
    }
  } else if constexpr (R > 1) {
    quantized_tile_by_panels<R - 1, F>(a, block, first, num_rows, begin, end);
  }
}

template <Format F>
inline void quantized_linear_as(const LinearArgs& a) {
  const int64_t groups = num_groups<F>(a.k), element = kDTypeBytes[static_cast<int>(a.x_dtype)];
  int64_t rows = 4 * kBlockFloats / max_of<int64_t>(a.k, 1) / kTileRows * kTileRows;
  rows = min_of(max_of<int64_t>(rows, kTileRows), a.rows);
  float* memory = scratch(RoundedTiles<F>::size(rows, groups) + (a.bias ? a.n : 0));
  RoundedTiles<F> x;
  x.codes = reinterpret_cast<int32_t*>(memory);
  x.scales = memory + rows * groups * RoundedTiles<F>::kLanesOf;
  x.offset = reinterpret_cast<int32_t*>(x.scales + rows * groups);
  float* bias = a.bias ? x.scales + 2 * rows * groups : nullptr;
  if (bias)
    with_dtype(a.x_dtype, [&](auto t) {
      for (int64_t i = 0; i < a.n; ++i) bias[i] = to_float(static_cast<const decltype(t)*>(a.bias)[i]);
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
    parallel_for(panels, panel_grain(panels, groups * kGroupBytes<F>), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t t = 0; t < tiles.count; ++t)
          quantized_tile_by_panels<kTileRows, F>(a, block, tiles.first(t), tiles.rows(t), p, p + 1);
    });
  }
}

// -- by format -----------------------------------------------------------------------------------

template <Format F>
struct Chosen {
  static constexpr Format format = F;
};
template <typename Body>
PORTALM_INLINE void with_quantized(Format format, const Body& body) {
  switch (format) {
    case Format::q8: body(Chosen<Format::q8>{}); break;
    case Format::q4: body(Chosen<Format::q4>{}); break;
    case Format::q4_min: body(Chosen<Format::q4_min>{}); break;
    case Format::q8_16: body(Chosen<Format::q8_16>{}); break;
    default: break;
  }
}

PORTALM_INLINE bool is_quantized(Format format) { return format >= Format::q8; }

inline int64_t packed_bytes(Format format, int64_t n, int64_t k) {
  int64_t bytes = 0;
  if (is_quantized(format))
    with_quantized(format, [&](auto f) { bytes = quantized_bytes<decltype(f)::format>(n, k); });
  else
    with_dtype(static_cast<DType>(format), [&](auto w) { bytes = packed_bytes_of<decltype(w)>(n, k); });
  return bytes;
}

inline void pack(const PackArgs& a) {
  if (is_quantized(a.format))
    with_quantized(a.format, [&](auto f) {
      with_dtype(a.dtype, [&](auto w) { quantize_as<decltype(f)::format, decltype(w)>(a); });
    });
  else
    with_dtype(a.dtype, [&](auto w) { pack_as<decltype(w)>(a); });
}

inline void pack_codes(const PackCodesArgs& a) {
  with_quantized(a.format, [&](auto f) { pack_codes_as<decltype(f)::format>(a); });
}

inline void linear(const LinearArgs& a) {
  if (is_quantized(a.format))
    with_quantized(a.format, [&](auto f) { quantized_linear_as<decltype(f)::format>(a); });
  else
    with_dtype(static_cast<DType>(a.format), [&](auto w) { linear_as<decltype(w)>(a); });
}

}  // namespace portalm::PORTALM_ISA
