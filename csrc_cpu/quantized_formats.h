// Quantized weights: their formats, their layout in memory, and the rounding of other weights to
// them.
//
//   weight   panels of kPanel rows; for each group the scales of the panel's rows, their minimums
//            if the format has them, then the codes. A unit of 16 bits (8 if the format multiplies
//            quads of bytes) holds as many codes as fit, and the units of a pair (quad) of k of one
//            row form a 32-bit lane: [lanes][kPanel][kStep] units
//
// Products: linear_quantized.h.
// Tested:   tests/unit/test_cpu_linear.py
#pragma once

#include "linear.h"

namespace portalm::PORTALM_ISA {

struct FormatShape {
  int64_t group;  // consecutive k that share a scale
  int bits;       // of a code
  int zero;       // code of 0 in formats without a minimum
  bool has_minimum;
  int x_bits;  // bits of x's codes, without the sign
};
constexpr FormatShape kFormats[] = {
    {32, 8, 128, false, 7},   // Format::q8
    {32, 4, 8, false, 7},     // Format::q4
    {32, 4, 0, true, 7},      // Format::q4_min
    {32, 8, 128, false, 14},  // Format::q8_x16
    {32, 4, 8, false, 14},    // Format::q4_x16
    {32, 4, 0, true, 14},     // Format::q4_min_x16
    {16, 8, 128, false, 14},  // Format::q8_16_x16
    // Format::blocks: sums reach 64 * 2^12 * 8160 < 2^31 (8160: the largest code of a bfloat16)
    {64, 16, 0, false, 12},
    {32, 8, 0, true, 14},  // Format::q8_min_x16
    {16, 8, 0, true, 14},  // Format::q8_16_min_x16
};
template <Format F>
constexpr FormatShape kShape = kFormats[static_cast<int>(F) - static_cast<int>(Format::q8)];

// Whether integer products are faster than bfloat16 products.
#if defined(__SSE2__)
constexpr bool kAsBlocks = !kDotsPairs;
#else
constexpr bool kAsBlocks = false;
#endif

#if (defined(__AVX512VNNI__) && PORTALM_LANES == 16) || defined(__AVXVNNI__) || \
    defined(PORTALM_EMULATED)
constexpr bool kHasQuads = true;  // 8-bit codes are multiplied four at a time
#else
constexpr bool kHasQuads = false;
#endif

template <Format F>
constexpr bool kAsQuads = kShape<F>.x_bits == 7;
template <Format F>
constexpr int64_t kStep = kAsQuads<F> ? 4 : 2;  // values of k in one 32-bit lane
template <Format F>
constexpr int kUnitBits = kAsQuads<F> ? 8 : 16;
template <Format F>
constexpr int kCodesInUnit = kUnitBits<F> / kShape<F>.bits;

// -- the layout ----------------------------------------------------------------------------------

template <Format F>
struct ScaleOf {
  using Type = fp16;
};
template <>
struct ScaleOf<Format::blocks> {
  using Type = float;
};
template <Format F>
using Scale = typename ScaleOf<F>::Type;

template <Format F>
constexpr int64_t kHeaderBytes =
    kPanel * static_cast<int64_t>(sizeof(Scale<F>)) * (kShape<F>.has_minimum ? 2 : 1);
template <Format F>
constexpr int64_t kGroupBytes = kHeaderBytes<F> + kPanel * kShape<F>.group * kShape<F>.bits / 8;
template <Format F>
constexpr int64_t kLanesOfGroup = kShape<F>.group / kStep<F>;

template <Format F>
PORTALM_INLINE int64_t num_groups(int64_t k) {
  return (k + kShape<F>.group - 1) / kShape<F>.group;
}

// Store row `j` of a panel: codes [groups * G], scales and minimums [groups].
template <Format F, typename Code>
inline void place_row(uint8_t* panel, int64_t j, const Code* codes, const float* scales,
                      const float* minimums, int64_t groups) {
  constexpr FormatShape shape = kShape<F>;
  constexpr int64_t vectors = kLanesOfGroup<F> / kCodesInUnit<F>;
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* group = panel + g * kGroupBytes<F>;
    Scale<F>* header = reinterpret_cast<Scale<F>*>(group);
    put(header + j, scales[g]);
    if (shape.has_minimum) put(header + kPanel + j, minimums[g]);
    uint8_t* to = group + kHeaderBytes<F> + j * 4;
    const Code* from = codes + g * shape.group;
    for (int64_t v = 0; v < vectors; ++v) {
      uint32_t lane = 0;
      for (int i = 0; i < kCodesInUnit<F>; ++i) {
        const Code* at = from + (v + i * vectors) * kStep<F>;
        uint32_t units = 0;
        for (int64_t k = 0; k < kStep<F>; ++k)
          units |= (static_cast<uint32_t>(at[k]) & ((1u << kUnitBits<F>)-1)) << (k * kUnitBits<F>);
        lane |= units << (i * shape.bits);
      }
      memcpy(to + v * kPanel * 4, &lane, 4);
    }
  }
}

template <Format F>
inline int64_t quantized_bytes(int64_t n, int64_t k) {
  return (n + kPanel - 1) / kPanel * num_groups<F>(k) * kGroupBytes<F>;
}

// Pack a checkpoint's codes, scales and minimums.
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
                     a.minimums ? a.minimums + row * groups : nullptr, groups);
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

// The power of two in units of which `largest` (at least 2^-100) has `bits` integer bits; its
// inverse.
struct PowerOfTwo {
  PORTALM_INLINE PowerOfTwo(float largest, int bits) {
    const int32_t at = __builtin_bit_cast(int32_t, max_of(largest, 7.9e-31f)) >> 23;
    scale = __builtin_bit_cast(float, (at + 1 - bits) << 23);
    inverse = __builtin_bit_cast(float, (253 - at + bits) << 23);
  }
  float scale, inverse;
};

// One group of a row in vectors, padded with zeros after its last column.
template <int64_t G>
struct Values {
  static constexpr int64_t count = G / kLanes;
  template <typename T>
  PORTALM_INLINE Values(const T* from, int64_t left) {
    if (left >= G) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < count; ++i) v[i] = load(from + i * kLanes);
    } else {
      for (int64_t i = 0; i < count; ++i)
        v[i] = load_part(from + i * kLanes,
                         min_of<int64_t>(max_of<int64_t>(left - i * kLanes, 0), kLanes));
    }
  }
  // Bits of the largest absolute value: they are ordered as the values are.
  PORTALM_INLINE int32_t largest_bits() const {
    VecI largest{};
#pragma GCC unroll 16
    for (int64_t i = 0; i < count; ++i)
      largest = max_of(largest, __builtin_bit_cast(VecI, v[i]) & 0x7FFFFFFF);
    return max_lane(largest);
  }
  // v * inverse, rounded to the nearest integer; |v * inverse| < 2^22.
  PORTALM_INLINE VecI whole(int64_t i, float inverse) const {
    const Vec magic = splat(12582912.0f);
    return __builtin_convertvector((v[i] * splat(inverse) + magic) - magic, VecI);
  }
  Vec v[count];
};
constexpr int32_t kInfinityBits = 0x7F800000;

// Round a group to codes [G] with a scale and a minimum; returns the sum of squared errors.
template <int64_t G>
PORTALM_INLINE float round_group(const Values<G>& w, float scale, float minimum, int largest,
                                 int32_t* codes) {
  const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  const Vec magic = splat(12582912.0f), top = splat(static_cast<float>(largest));
  Vec error{};
#pragma GCC unroll 8
  for (int64_t i = 0; i < w.count; ++i) {
    Vec code = max_of((w.v[i] - splat(minimum)) * splat(inverse), splat(0.0f));
    code = (select(code > top, top, code) + magic) - magic;
    const VecI whole = __builtin_convertvector(code, VecI);
    memcpy(codes + i * kLanes, &whole, sizeof whole);
    const Vec off = splat(minimum) + splat(scale) * code - w.v[i];
    error += off * off;
  }
  return sum(error);
}

// Choose the scale (and minimum) and the codes of a group. With 8 bits the largest value sets the
// scale; with 4 bits several narrower ranges are tried and the one with the least squared error
// wins.
template <Format F, typename W>
inline void choose_group(const W* from, int64_t left, uint8_t* codes, float* scale,
                         float* minimum) {
  constexpr FormatShape shape = kShape<F>;
  constexpr int largest = (1 << shape.bits) - 1;
  const Values<shape.group> w(from, left);
  Vec low_of = w.v[0], high_of = w.v[0];
  for (int64_t i = 1; i < w.count; ++i) {
    low_of = select(w.v[i] < low_of, w.v[i], low_of);
    high_of = max_of(high_of, w.v[i]);
  }
  const float low = -max_lane(-low_of), high = max_lane(high_of);
  float best = __builtin_inff();
  int32_t trial[2][shape.group] = {};
  int chosen = 0;
  constexpr int kTrials = shape.bits == 8 ? 1 : 16;
  for (int t = 0; t < kTrials; ++t) {
    const float shrink = 1.0f - 0.02f * static_cast<float>(t);
    float s, m;
    if (shape.has_minimum) {
      m = as_fp16(low * shrink);
      s = as_fp16(max_of(high * shrink - m, 0.0f) / largest);
    } else {
      // 8-bit codes use a symmetric range
      const float down = static_cast<float>(shape.bits == 8 ? shape.zero - 1 : shape.zero);
      s = as_fp16(max_of(high / (largest - shape.zero), -low / down) * shrink);
      m = -s * static_cast<float>(shape.zero);
    }
    const float error = round_group(w, s, m, largest, trial[1 - chosen]);
    if (error < best) {
      best = error;
      chosen = 1 - chosen;
      *scale = s;
      *minimum = m;
    }
  }
  for (int64_t i = 0; i < shape.group; ++i)
    codes[i] = i < left ? static_cast<uint8_t>(trial[chosen][i]) : uint8_t{0};
}

// Round a group to 13 bits and a sign, with a power of two as scale; the scale is NaN if a value of
// the group is not finite.
template <int64_t G, typename W>
PORTALM_INLINE void choose_block(const W* w, int64_t left, int16_t* codes, float* scale) {
  const Values<G> values(w, left);
  const int32_t bits = values.largest_bits();
  const PowerOfTwo power(__builtin_bit_cast(float, bits), 13);
#pragma GCC unroll 16
  for (int64_t i = 0; i < values.count; ++i) {
    const VecI whole = values.whole(i, power.inverse);
    for (int l = 0; l < kLanes; ++l) codes[i * kLanes + l] = static_cast<int16_t>(whole[l]);
  }
  *scale = bits < kInfinityBits ? power.scale : __builtin_nanf("");
}

template <Format F, typename W>
inline void quantize_as(const PackArgs& a) {
  constexpr int64_t kGroup = kShape<F>.group;
  const int64_t groups = num_groups<F>(a.k), panel_bytes = groups * kGroupBytes<F>;
  parallel_for((a.n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    float* scales = scratch(2 * groups + groups * kGroup);
    float* minimums = scales + groups;
    uint8_t* codes = reinterpret_cast<uint8_t*>(minimums + groups);
    int16_t* wide_codes = reinterpret_cast<int16_t*>(codes);
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = static_cast<uint8_t*>(a.packed) + p * panel_bytes;
      memset(panel, 0, panel_bytes);
      for (int64_t j = 0; j < kPanel && p * kPanel + j < a.n; ++j) {
        const W* row = static_cast<const W*>(a.source) + (p * kPanel + j) * a.k;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t count = min_of(kGroup, a.k - g * kGroup);
          if constexpr (F == Format::blocks) {
            choose_block<kGroup>(row + g * kGroup, count, wide_codes + g * kGroup, scales + g);
          } else {
            choose_group<F>(row + g * kGroup, count, codes + g * kGroup, scales + g, minimums + g);
          }
        }
        if constexpr (F == Format::blocks)
          place_row<F>(panel, j, wide_codes, scales, nullptr, groups);
        else place_row<F>(panel, j, codes, scales, minimums, groups);
      }
    }
  });
}

}  // namespace portalm::PORTALM_ISA
