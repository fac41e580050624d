// Vectors of PORTALM_LANES floats with the vector extensions of GCC and Clang, so that one source
// serves every instruction set; intrinsics only where the compiler does not choose the instruction.
//
// Everything is in a namespace named after the instruction set: the same function compiled with
// other flags must have another name, or the linker would keep only one of them. For the same
// reason kernels use no inline functions of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PORTALM_INLINE inline __attribute__((always_inline))

namespace portalm::PORTALM_ISA {

constexpr int kLanes = PORTALM_LANES;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Vec16 __attribute__((vector_size(2 * kLanes)));

#if defined(__aarch64__)
typedef __fp16 Half;  // GCC 12 supports _Float16 only in C there
#elif !defined(__F16C__)
typedef _Float16 Half;
#endif

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct i8 {
  int8_t code;
};
struct f8 {
  uint8_t bits;  // float8 e4m3fn, without NaN
};

template <typename T>
PORTALM_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
PORTALM_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}

PORTALM_INLINE Vec splat(float x) { return x - Vec{}; }

// -- one number ----------------------------------------------------------------------------------

PORTALM_INLINE float to_float(float x) { return x; }
PORTALM_INLINE float to_float(bf16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
PORTALM_INLINE float to_float(fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return static_cast<float>(__builtin_bit_cast(Half, x.bits));
#endif
}

PORTALM_INLINE float to_float(i8 x) { return x.code; }
PORTALM_INLINE float to_float(f8 x) {
  const uint32_t bits = (x.bits & 0x80u) << 24 | (x.bits & 0x7Fu) << 20;
  return __builtin_bit_cast(float, bits) * 0x1p120f;
}

PORTALM_INLINE void put(float* p, float x) { *p = x; }
PORTALM_INLINE void put(bf16* p, float x) {  // to nearest, ties to even; keeps NaN
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
}
PORTALM_INLINE void put(fp16* p, float x) {
#if defined(__F16C__)
  p->bits = static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  p->bits = __builtin_bit_cast(uint16_t, static_cast<Half>(x));
#endif
}

PORTALM_INLINE void put(i8* p, float x) {  // to nearest, ties to even; |x| < 127.5
  p->code = static_cast<int8_t>(__builtin_lrintf(x));
}
PORTALM_INLINE void put(f8* p, float x) {  // to nearest, ties to even; |x| < 464
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), size = bits & 0x7FFFFFFF;
  uint32_t code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3);
  if (size < 0x3C800000) {  // below 2^-6 the spacing is 2^-9, as that of floats from 2^14 on
    const float moved = __builtin_bit_cast(float, size) + 0x1p14f;
    code = __builtin_bit_cast(uint32_t, moved) - __builtin_bit_cast(uint32_t, 0x1p14f);
  }
  p->bits = static_cast<uint8_t>(bits >> 24 & 0x80) | static_cast<uint8_t>(code);
}

// -- whole vectors, at any address ----------------------------------------------------------------

PORTALM_INLINE Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
PORTALM_INLINE Vec load(const bf16* p) {
#if defined(__AVX2__) && PORTALM_LANES == 8  // the compiler would widen each half separately
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#elif defined(__AVX512F__) && PORTALM_LANES == 16
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  Vec16 x;
  memcpy(&x, p, sizeof x);
  return __builtin_bit_cast(Vec, __builtin_convertvector(x, VecU) << 16);
#endif
}
PORTALM_INLINE Vec load(const fp16* p) {
#if defined(__AVX512F__) && PORTALM_LANES == 16
  return __builtin_bit_cast(Vec, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__F16C__) && PORTALM_LANES == 8
  return __builtin_bit_cast(Vec, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

PORTALM_INLINE Vec load(const i8* p) {
#if defined(__AVX512F__) && PORTALM_LANES == 16
  const __m128i codes = _mm_loadu_si128((const __m128i*)p);
  return __builtin_bit_cast(Vec, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
#elif defined(__AVX2__) && PORTALM_LANES == 8
  const __m128i codes = _mm_loadl_epi64((const __m128i*)p);
  return __builtin_bit_cast(Vec, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)));
#else
  typedef int8_t Vec8 __attribute__((vector_size(kLanes)));
  Vec8 codes;
  memcpy(&codes, p, sizeof codes);
  return __builtin_convertvector(__builtin_convertvector(codes, VecI), Vec);
#endif
}

// In units of 2^8: shifted up, the bits after the sign are a float16 with another exponent bias.
PORTALM_INLINE Vec load(const f8* p) {
#if defined(__AVX512F__) && PORTALM_LANES == 16
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(~0x407F));
  return __builtin_bit_cast(Vec, _mm512_cvtph_ps(half));
#elif defined(__F16C__) && PORTALM_LANES == 8
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(~0x407F));
  return __builtin_bit_cast(Vec, _mm256_cvtph_ps(half));
#else
  typedef uint8_t Vec8 __attribute__((vector_size(kLanes)));
  Vec8 codes;
  memcpy(&codes, p, sizeof codes);
  const VecU bits = __builtin_convertvector(codes, VecU);
  const VecU moved = (bits & 0x80) << 24 | (bits & 0x7F) << 20;
  return __builtin_bit_cast(Vec, moved) * splat(0x1p112f);
#endif
}

PORTALM_INLINE void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }
PORTALM_INLINE void store(bf16* p, Vec x) {
  VecU bits = __builtin_bit_cast(VecU, x);
  VecU rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  VecU quiet = (bits >> 16) | 0x40;
  VecU is_nan = __builtin_bit_cast(VecU, (bits & 0x7FFFFFFF) > 0x7F800000);
  VecU chosen = (quiet & is_nan) | (rounded & ~is_nan);
#if defined(__AVX2__) && PORTALM_LANES == 8
  __m256i packed = _mm256_packus_epi32((__m256i)chosen, (__m256i)chosen);  // within halves
  packed = _mm256_permute4x64_epi64(packed, 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  Vec16 narrow = __builtin_convertvector(chosen, Vec16);
  memcpy(p, &narrow, sizeof narrow);
#endif
}
PORTALM_INLINE void store(fp16* p, Vec x) {
#if defined(__AVX512F__) && PORTALM_LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(__builtin_bit_cast(__m512, x), 0));
#elif defined(__F16C__) && PORTALM_LANES == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(__builtin_bit_cast(__m256, x), 0));
#else
  for (int i = 0; i < kLanes; ++i) put(p + i, x[i]);
#endif
}

// Load the first `count` elements, with 0 for the others, which are not read; store the first
// `count`.
template <typename T>
PORTALM_INLINE Vec load_part(const T* p, int64_t count) {
  Vec x{};
  for (int64_t i = 0; i < count; ++i) x[i] = to_float(p[i]);
  return x;
}
template <typename T>
PORTALM_INLINE void store_part(T* p, Vec x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) put(p + i, x[i]);
}

// Keep x in a register: it is used more than once, and loads are the bottleneck.
PORTALM_INLINE Vec kept(Vec x) {
#if (defined(__AVX512F__) && PORTALM_LANES == 16) || (defined(__AVX__) && PORTALM_LANES == 8)
  asm("" : "+v"(x));
#endif
  return x;
}

// -- arithmetic ----------------------------------------------------------------------------------

PORTALM_INLINE Vec select(VecI mask, Vec yes, Vec no) { return mask ? yes : no; }
PORTALM_INLINE Vec max_of(Vec a, Vec b) { return select(a < b, b, a); }
PORTALM_INLINE VecI max_of(VecI a, VecI b) { return a < b ? b : a; }

// Lane i of the result is lane i + Width of x, wrapping around.
template <int Width>
PORTALM_INLINE Vec lanes_from(Vec x) {
#if defined(__clang__)
  Vec y;
  for (int i = 0; i < kLanes; ++i) y[i] = x[(i + Width) % kLanes];
  return y;
#else
  // spelled out: GCC would rebuild a mask that a loop computes on every use
#define PORTALM_FROM(i) ((i) + Width) % kLanes
#define PORTALM_FROM4(i) \
  PORTALM_FROM(i), PORTALM_FROM(i + 1), PORTALM_FROM(i + 2), PORTALM_FROM(i + 3)
#if PORTALM_LANES == 4
  constexpr VecI from = {PORTALM_FROM4(0)};
#elif PORTALM_LANES == 8
  constexpr VecI from = {PORTALM_FROM4(0), PORTALM_FROM4(4)};
#else
  constexpr VecI from = {PORTALM_FROM4(0), PORTALM_FROM4(4), PORTALM_FROM4(8), PORTALM_FROM4(12)};
#endif
#undef PORTALM_FROM4
#undef PORTALM_FROM
  return __builtin_shuffle(x, from);
#endif
}

// Sum and maximum over the lanes, always in the same order.
template <int Width = kLanes / 2>
PORTALM_INLINE float sum(Vec x) {
  x += lanes_from<Width>(x);
  if constexpr (Width > 1) return sum<Width / 2>(x);
  return x[0];
}
template <int Width = kLanes / 2>
PORTALM_INLINE float max_lane(Vec x) {
  x = max_of(x, lanes_from<Width>(x));
  if constexpr (Width > 1) return max_lane<Width / 2>(x);
  return x[0];
}
template <int Width = kLanes / 2>
PORTALM_INLINE int32_t max_lane(VecI x) {
  x = max_of(x, __builtin_bit_cast(VecI, lanes_from<Width>(__builtin_bit_cast(Vec, x))));
  if constexpr (Width > 1) return max_lane<Width / 2>(x);
  return x[0];
}

// e^x within 2 ulp for x <= 0 (and up to 88): Cody and Waite's reduction, a polynomial of degree 6
// (Cephes expf). Below -87 it is 0; keeps NaN.
PORTALM_INLINE Vec exp_of(Vec x) {
  VecI too_small = x < splat(-87.0f);
  Vec clamped = select(too_small, splat(-87.0f), x);
  clamped = select(clamped > splat(88.0f), splat(88.0f), clamped);
  Vec n = clamped * splat(1.44269504088896341f);
  // round to nearest: adding and subtracting 1.5 * 2^23 leaves an integer
  Vec magic = splat(12582912.0f);
  n = (n + magic) - magic;
  Vec r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  VecI exponent = (__builtin_convertvector(n, VecI) + 127) << 23;
  Vec result = p * __builtin_bit_cast(Vec, exponent);
  result = select(too_small, splat(0.0f), result);
  return select(x == x, result, x);
}

}  // namespace portalm::PORTALM_ISA
