// The inner parts of attention.h: the state of a softmax over spans, and scores of query rows against
// the keys of one block.
//
// Meaning:  as attention.h: the arithmetic of a row does not depend on the number of rows.
#pragma once

#include "kv_cache.h"

namespace portalm::PORTALM_ISA {

constexpr int64_t kChunk = 64;  // tokens whose scores are held at a time; divides kSplitTokens
constexpr int64_t kScoreStride = kChunk + kLanes;  // a whole vector may be stored at the last token
constexpr int kRowTile = kLanes == 16 ? 8 : 4;     // rows of two vectors that fit the registers
constexpr int kSharedRows = kLanes == 16 ? 12 : 6;  // the same over keys that are values

// Softmax so far: largest score, sum of weights, weighted values.
struct Running {
  float* largest;  // [rows]
  float* weight;   // [rows]
  float* value;    // [rows, stride]: value size, rounded up to whole vectors
  int64_t stride;
};

PORTALM_INLINE int64_t row_stride(int64_t value_size) {
  return (value_size + kLanes - 1) / kLanes * kLanes;
}
PORTALM_INLINE Running running_at(float* p, int64_t rows, int64_t value_size) {
  return {p, p + rows, p + 2 * rows, row_stride(value_size)};
}
PORTALM_INLINE int64_t running_floats(int64_t rows, int64_t value_size) {
  return partial_floats(rows, value_size, kLanes);
}

PORTALM_INLINE void clear(Running r, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) r.largest[i] = -__builtin_inff();
  memset(r.weight, 0, rows * sizeof(float));
  memset(r.value, 0, rows * r.stride * sizeof(float));
}

// Merge the next span into the total of the spans before it.
inline void merge(Running total, Running span, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    if (span.weight[r] == 0) continue;  // the row saw none of it
    const float largest = max_of(total.largest[r], span.largest[r]);
    const bool is_first = total.weight[r] == 0;
    const float keep = is_first ? 0.0f : exp_of(splat(total.largest[r] - largest))[0];
    const float add = is_first ? 1.0f : exp_of(splat(span.largest[r] - largest))[0];
    total.largest[r] = largest;
    total.weight[r] = total.weight[r] * keep + span.weight[r] * add;
    float* to = total.value + r * total.stride;
    const float* from = span.value + r * span.stride;
    for (int64_t d = 0; d < total.stride; d += kLanes)
      store(to + d, load(to + d) * splat(keep) + load(from + d) * splat(add));
  }
}

// A pair of vectors: two dimensions of keys or two tokens of values, `stride` elements apart.
struct VecPair {
  Vec first, second;
};
template <typename K>
PORTALM_INLINE VecPair load_pair(const K* p, int64_t stride) {
  return {load(p), load(p + stride)};
}
PORTALM_INLINE VecPair load_pair(const bf16* p, int64_t) {
  VecU both;
  memcpy(&both, p, sizeof both);
  return {__builtin_bit_cast(Vec, both << 16), __builtin_bit_cast(Vec, both & 0xFFFF0000)};
}

// Prefetch what `p` will be in the next chunk, `ahead` bytes further on (0: there is no next
// chunk). In decode every read of keys or values prefetches the next chunk's, so that memory is
// never idle.
template <typename K>
PORTALM_INLINE void read_ahead(const K* p, int64_t ahead, int64_t stride) {
  if (ahead == 0) return;
  __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead, 0, 3);
  if (kPack<K> == 1 && stride * sizeof(K) > 32)  // else the same line of memory
    __builtin_prefetch(reinterpret_cast<const char*>(p + stride) + ahead, 0, 3);
}

// scores[r][b] = query[r] . keys[:, b] for N vectors of tokens, R rows.
template <int R, int N, typename K>
PORTALM_INLINE void score_tile(const float* query, int64_t head_size, const K* keys,
                               int64_t block_size, int64_t ahead, float* scores) {
  Vec acc[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = splat(0.0f);  // `= {}` would go through memory
  for (int64_t d = 0; d < head_size; d += 2) {
    read_ahead(keys + d * block_size, ahead, block_size);
    VecPair k[N];
    for (int n = 0; n < N; ++n)
      k[n] = load_pair(keys + d * block_size + n * kLanes * kPack<K>, block_size);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec q = splat(query[r * head_size + d]);
      for (int n = 0; n < N; ++n) acc[r][n] += q * k[n].first;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec q = splat(query[r * head_size + d + 1]);
      for (int n = 0; n < N; ++n) acc[r][n] += q * k[n].second;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(scores + r * kScoreStride + n * kLanes, acc[r][n]);
}

// Scores of `tokens` contiguous tokens of a block. If they do not fill a vector, the remaining
// lanes are undefined: the next unit or the mask overwrites them.
template <int R, typename K>
PORTALM_INLINE void unit_scores(const float* query, int64_t head_size, const K* keys,
                                int64_t block_size, int64_t tokens, int64_t ahead, float* scores) {
  int64_t b = 0;
  for (; b + 2 * kLanes <= tokens; b += 2 * kLanes)
    score_tile<R, 2>(query, head_size, keys + b * kPack<K>, block_size, ahead, scores + b);
  for (; b < tokens; b += kLanes)
    score_tile<R, 1>(query, head_size, keys + b * kPack<K>, block_size, ahead, scores + b);
}

// The same over keys in the layout of values (shared values), two tokens at a time: lanes are
// dimensions, summed at the end.
template <int R, typename K>
PORTALM_INLINE void unit_scores_by_rows(const float* query, int64_t head_size, const K* keys,
                                        int64_t tokens, int64_t ahead, float* scores) {
  for (int64_t b = 0; b < tokens; b += 2) {
    Vec acc[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = splat(0.0f);
    const K* row = keys + b * head_size;
    for (int64_t d = 0; d < head_size; d += kLanes) {
      read_ahead(row + d * kPack<K>, ahead, head_size);
      const VecPair k = load_pair(row + d * kPack<K>, head_size);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec q = kept(load(query + r * head_size + d));
        acc[r][0] += q * k.first;
        acc[r][1] += q * k.second;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) scores[r * kScoreStride + b + i] = sum(acc[r][i]);
  }
}

// Call body<R>(row) for rows [row, end), Tile at a time, then once for the remainder.
template <int R, typename Body>
PORTALM_INLINE void rest_of_rows(int64_t row, int64_t count, const Body& body) {
  if (count == R) {
    body.template operator()<R>(row);
  } else if constexpr (R > 1) {
    rest_of_rows<R - 1>(row, count, body);
  }
}
template <int Tile = kRowTile, typename Body>
PORTALM_INLINE void for_rows(int64_t row, int64_t end, const Body& body) {
  for (; row + Tile <= end; row += Tile) body.template operator()<Tile>(row);
  rest_of_rows<Tile - 1>(row, end - row, body);
}

}  // namespace portalm::PORTALM_ISA
