// attention: causal attention of this step's query tokens over their requests' paged context.
//
//   query        [T, H, D]; out [T, H, V], V <= D
//   cache        as in kv_cache.h; block_table int32 [S, max_blocks]
//   items        AttentionItem [N] (kernels.h), made by backends/cpu/attention.py: a tile of query
//                tokens of one request against all of its context or one split of it
//
// Mapping:  the team takes (item, KV head) pairs, most work first. All query heads of a KV head are
//           rows of one tile, so that each key and value is loaded once for all of them.
// Bound by: memory in decode (each key and value is read once), multiply-adds in prefill.
// Meaning:  ReferenceBackend.attend. A row's arithmetic is a function of its position alone: scores
//           are taken in spans of kSplitTokens tokens from the beginning of the context, each span
//           has its own softmax, and spans are merged in order, by one thread or by several. So a
//           result does not depend on the batch or on how a prompt was chunked.
// Needs:    block sizes that divide kSplitTokens; with shared values, a head size of whole vectors.
//           Slots past a request's context may hold anything, NaN included: masked tokens do not
//           affect a row.
// Tested:   tests/unit/test_cpu_kernels.py; speed: benchmarks/kernels/layers.py
#pragma once

#include "attention_scores.h"
#include "scratch.h"

namespace portalm::PORTALM_ISA {

using Item = AttentionItem;

// A chunk of the context, tokens [start, start + kChunk), in units of contiguous tokens: whole
// blocks, or parts of one.
template <typename K>
struct Chunk {
  int64_t start, unit, num_units;
  const K* keys[kChunk / 8];
  const K* values[kChunk / 8];
  int64_t ahead[kChunk / 8];
  const bf16* scales[kChunk / 8];  // codes only: the keys'; the values' are block_size later
};

template <typename K>
PORTALM_INLINE Chunk<K> chunk_at(const AttentionArgs& a, const Item& item, int64_t head,
                                 int64_t start, int64_t end) {
  const KVShape& s = a.shape;
  const int32_t* table = a.block_table + item.request * a.max_blocks;
  Chunk<K> chunk;
  chunk.start = start;
  chunk.unit = min_of(s.block_size, kChunk);
  chunk.num_units = (min_of(end, start + kChunk) - start + chunk.unit - 1) / chunk.unit;
  for (int64_t u = 0; u < chunk.num_units; ++u) {
    const int64_t token = start + u * chunk.unit, offset = token % s.block_size;
    const K* block =
        static_cast<const K*>(a.cache) + keys_at<K>(s, table[token / s.block_size], head);
    chunk.values[u] = block + (num_planes(s) - 1) * head_elements(s) + offset * s.head_size;
    chunk.keys[u] = s.shares_values ? chunk.values[u] : block + offset * kPack<K>;
    chunk.ahead[u] = 0;
    if constexpr (kIsCode<K>) chunk.scales[u] = scales_of(block, s) + offset;
  }
  return chunk;
}

// acc[r] += weights[r] * v, R rows.
template <int R, int N>
PORTALM_INLINE void add_weighted(const float* weights, const Vec (&v)[N], Vec (&acc)[R][N]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec p = splat(weights[r * kScoreStride]);
    for (int n = 0; n < N; ++n) acc[r][n] += p * v[n];
  }
}

// value[r] += sum over tokens [from, to) of the chunk of weights[r][token] * values[token], for N
// vectors of dimensions from `d` on, R rows. Token by token, in order, wherever pairs begin.
template <int R, int N, typename K>
PORTALM_INLINE void value_tile(const float* weights, const Chunk<K>& chunk, int64_t head_size,
                               int64_t d, int64_t from, int64_t to, float* value, int64_t stride) {
  Vec acc[R][N], first[N], second[N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = load(value + r * stride + n * kLanes);
  for (int64_t u = from / chunk.unit; u * chunk.unit < to; ++u) {
    const int64_t start = u * chunk.unit;
    // shared values were prefetched as keys
    const int64_t ahead = chunk.values[u] == chunk.keys[u] ? 0 : chunk.ahead[u];
    int64_t t = max_of(from - start, int64_t{0});
    const int64_t until = min_of(to - start, chunk.unit);
    const float* w = weights + start;
    const K* v = chunk.values[u] + (t & ~int64_t{1}) * head_size + d * kPack<K>;
    const auto load_both = [&] {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const VecPair pair = load_pair(v + n * kLanes * kPack<K>, head_size);
        first[n] = pair.first;
        second[n] = pair.second;
      }
    };
    if (t % 2 != 0) {
      load_both();
      add_weighted<R, N>(w + t, second, acc);
      t += 1;
      v += 2 * head_size;
    }
    for (; t + 2 <= until; t += 2, v += 2 * head_size) {
      read_ahead(v, ahead, head_size);
      load_both();
      add_weighted<R, N>(w + t, first, acc);
      add_weighted<R, N>(w + t + 1, second, acc);
    }
    if (t < until) {
      load_both();
      add_weighted<R, N>(w + t, first, acc);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(value + r * stride + n * kLanes, acc[r][n]);
}

// Tokens [from, to) of a chunk that a row may see, from its start.
struct Seen {
  int64_t from, to;
};
PORTALM_INLINE Seen seen_by(const AttentionArgs& a, int64_t position, int64_t start) {
  const int64_t from = a.window ? position - a.window + 1 - start : 0;
  return {max_of<int64_t>(from, 0), min_of<int64_t>(position + 1 - start, kChunk)};
}

// Apply soft cap and ALiBi, set the scores of masked tokens to -inf, and return the largest score.
// `distance`: position of the chunk's first token minus the row's, at most 0.
PORTALM_INLINE float mask_scores(const AttentionArgs& a, Seen seen, float slope, int64_t distance,
                                 float* s) {
  const float hidden = -__builtin_inff();
  if (a.soft_cap > 0)
    for (int64_t i = seen.from; i < seen.to; ++i)
      s[i] = a.soft_cap * __builtin_tanhf(s[i] / a.soft_cap);
  if (slope != 0)
    for (int64_t i = seen.from; i < seen.to; ++i) s[i] += slope * (distance + i);
  for (int64_t i = 0; i < seen.from; ++i) s[i] = hidden;
  for (int64_t i = seen.to; i < kChunk; ++i) s[i] = hidden;
  Vec best = splat(hidden);
  for (int64_t i = 0; i < kChunk; i += kLanes) best = max_of(best, load(s + i));
  return max_lane(best);
}

// Turn a row's scores into weights and rescale its sums to the new largest score. A NaN score makes
// the row NaN.
PORTALM_INLINE void weigh(float largest, float* s, Running out, int64_t r) {
  const float base = largest == -__builtin_inff() ? 0.0f : largest;
  Vec weight{};
  for (int64_t i = 0; i < kChunk; i += kLanes) {
    const Vec p = exp_of(load(s + i) - splat(base));
    store(s + i, p);
    weight += p;
  }
  const float keep = exp_of(splat(out.largest[r] - base))[0];
  out.largest[r] = largest;
  out.weight[r] = out.weight[r] * keep + sum(weight);
  if (keep != 1.0f) {
    float* value = out.value + r * out.stride;
    for (int64_t d = 0; d < out.stride; d += kLanes)
      store(value + d, load(value + d) * splat(keep));
  }
}

// The scale of each token's key codes in a chunk (`side` 0) or value codes (`side` block_size).
template <typename K>
PORTALM_INLINE void load_scales(const Chunk<K>& chunk, int64_t side, float* scales) {
  for (int64_t u = 0; u < chunk.num_units; ++u)
    for (int64_t b = 0; b < chunk.unit; b += kLanes)
      store(scales + u * chunk.unit + b, load(chunk.scales[u] + side + b) * splat(kUnit<K>));
}

// row[i] *= scales[i]. Scales of masked tokens may be anything: their products are not used.
PORTALM_INLINE void scale_row(float* row, const float* scales, int64_t tokens) {
  for (int64_t i = 0; i < tokens; i += kLanes) store(row + i, load(row + i) * load(scales + i));
}

// Attend to one chunk, for those rows of an item that see any of its tokens.
template <typename K>
inline void attend_chunk(const AttentionArgs& a, const Item& item, int64_t head, int64_t group,
                         const Chunk<K>& chunk, const float* query, float* scores, float* largest,
                         Running out) {
  const int64_t head_size = a.shape.head_size;
  int64_t first = 0, last = item.num_tokens;
  while (first < last && seen_by(a, item.position + first, chunk.start).to <= 0) ++first;
  while (first < last) {
    const Seen seen = seen_by(a, item.position + last - 1, chunk.start);
    if (seen.from < seen.to) break;
    --last;
  }
  for (int64_t u = 0; u < chunk.num_units; ++u) {
    float* to = scores + u * chunk.unit;
    if (a.shape.shares_values) {
      if constexpr (!kIsCode<K>)
        for_rows<kSharedRows>(first * group, last * group, [&]<int R>(int64_t r) {
          unit_scores_by_rows<R>(query + r * head_size, head_size, chunk.keys[u], chunk.unit,
                                 r == first * group ? chunk.ahead[u] : 0, to + r * kScoreStride);
        });
      continue;
    }
    for_rows(first * group, last * group, [&]<int R>(int64_t r) {
      unit_scores<R>(query + r * head_size, head_size, chunk.keys[u], a.shape.block_size,
                     chunk.unit, chunk.ahead[u], to + r * kScoreStride);
    });
  }
  const int64_t tokens = chunk.num_units * chunk.unit;
  float scales[kIsCode<K> ? kScoreStride : 1];
  if constexpr (kIsCode<K>) {
    load_scales(chunk, 0, scales);
    for (int64_t r = first * group; r < last * group; ++r)
      scale_row(scores + r * kScoreStride, scales, tokens);
  }
  // two loops, so that a row does not wait for another row's largest score
  for (int64_t r = first * group; r < last * group; ++r) {
    const int64_t position = item.position + r / group;
    const float slope = a.slopes ? a.slopes[head * group + r % group] : 0.0f;
    largest[r] =
        max_of(out.largest[r], mask_scores(a, seen_by(a, position, chunk.start), slope,
                                           chunk.start - position, scores + r * kScoreStride));
  }
  for (int64_t r = first * group; r < last * group; ++r)
    weigh(largest[r], scores + r * kScoreStride, out, r);
  if constexpr (kIsCode<K>) {
    load_scales(chunk, a.shape.block_size, scales);
    for (int64_t r = first * group; r < last * group; ++r)
      scale_row(scores + r * kScoreStride, scales, tokens);
  }
  // rows with the same bounds together: a weight of 0 would not hide a value that is not finite
  for (int64_t i = first; i < last;) {
    const Seen seen = seen_by(a, item.position + i, chunk.start);
    int64_t end = i + 1;
    for (; end < last; ++end) {
      const Seen other = seen_by(a, item.position + end, chunk.start);
      if (other.from != seen.from || other.to != seen.to) break;
    }
    const auto columns = [&]<int N>(int64_t d) {
      for_rows(i * group, end * group, [&]<int R>(int64_t r) {
        value_tile<R, N>(scores + r * kScoreStride, chunk, head_size, d, seen.from, seen.to,
                         out.value + r * out.stride + d, out.stride);
      });
    };
    int64_t d = 0;  // a few columns stay in the cache for all rows
    for (; d + 2 * kLanes <= out.stride; d += 2 * kLanes) columns.template operator()<2>(d);
    if (d < out.stride) columns.template operator()<1>(d);
    i = end;
  }
}

// Attend to one span, tokens [span, span + kSplitTokens) of the context, for all rows of an item.
template <typename K>
inline void attend_span(const AttentionArgs& a, const Item& item, int64_t head, int64_t group,
                        int64_t span, const float* query, float* scores, Running out) {
  float* largest = scores + item.num_tokens * group * kScoreStride;
  clear(out, item.num_tokens * group);
  const int64_t end = min_of<int64_t>(item.end, span + kSplitTokens);
  int64_t start = max_of<int64_t>(item.begin, span) / kChunk * kChunk;
  const bool reads_ahead =
      item.num_tokens * group <= kRowTile || (a.shape.shares_values && item.num_tokens == 1);
  Chunk<K> chunk = chunk_at<K>(a, item, head, start, end);
  for (; start < end; start += kChunk) {
    Chunk<K> next{};
    if (start + kChunk < item.end) next = chunk_at<K>(a, item, head, start + kChunk, item.end);
    for (int64_t u = 0; reads_ahead && u < min_of(chunk.num_units, next.num_units); ++u)
      chunk.ahead[u] = reinterpret_cast<const char*>(next.keys[u]) -
                       reinterpret_cast<const char*>(chunk.keys[u]);
    attend_chunk<K>(a, item, head, group, chunk, query, scores, largest, out);
    chunk = next;
  }
}

// The query rows of `item` in float32, scaled: row t * group + g is head g of token t.
inline void load_query(const AttentionArgs& a, const Item& item, int64_t head, int64_t group,
                       float* query) {
  const int64_t head_size = a.shape.head_size;
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = 0; i < item.num_tokens; ++i) {
      const T* from = static_cast<const T*>(a.query) + (item.first_token + i) * a.query_stride +
                      head * group * head_size;
      float* to = query + i * group * head_size;
      for (int64_t j = 0; j < group * head_size; ++j) to[j] = to_float(from[j]) * a.scale;
    }
  });
}

inline void store_out(const AttentionArgs& a, const Item& item, int64_t head, int64_t group,
                      Running total) {
  const int64_t size = a.value_size;
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = 0; i < item.num_tokens; ++i) {
      T* to = static_cast<T*>(a.out) + ((item.first_token + i) * a.heads + head * group) * size;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t r = i * group + g;
        float weight = total.weight[r];
        if (a.sinks) weight += exp_of(splat(a.sinks[head * group + g] - total.largest[r]))[0];
        const Vec scale = splat(1.0f / weight);
        const float* value = total.value + r * total.stride;
        int64_t d = 0;
        for (; d + kLanes <= size; d += kLanes) store(to + g * size + d, load(value + d) * scale);
        store_part(to + g * size + d, load(value + d) * scale, size - d);
      }
    }
  });
}

// Merge the partial results of a split tile in order; called by the thread that finished the last.
inline void merge_partials(const AttentionArgs& a, const Item& item, int64_t head, int64_t group,
                           int64_t partial_floats, Running total) {
  const int64_t rows = item.num_tokens * group;
  clear(total, rows);
  for (int64_t i = 0; i < item.num_partials; ++i) {
    const int64_t at = (item.first_partial + i) * a.shape.kv_heads + head;
    merge(total, running_at(a.partials + at * partial_floats, rows, a.value_size), rows);
  }
  store_out(a, item, head, group, total);
}

template <typename K>
inline void attend_item(const AttentionArgs& a, const Item& item, int64_t head,
                        int64_t partial_floats, int64_t max_rows) {
  const int64_t group = a.heads / a.shape.kv_heads, head_size = a.shape.head_size;
  const int64_t rows = item.num_tokens * group;
  float* memory = scratch(max_rows * (head_size + kScoreStride + 1) +
                          2 * running_floats(max_rows, a.value_size));
  float* query = memory;
  float* scores = query + max_rows * head_size;
  float* sums = scores + max_rows * (kScoreStride + 1);
  const Running span = running_at(sums, rows, a.value_size);
  const Running total =
      running_at(sums + running_floats(max_rows, a.value_size), rows, a.value_size);
  load_query(a, item, head, group, query);
  const int64_t first = item.begin / kSplitTokens * kSplitTokens;
  if (item.partial >= 0) {
    const int64_t at = item.partial * a.shape.kv_heads + head;
    attend_span<K>(a, item, head, group, first, query, scores,
                   running_at(a.partials + at * partial_floats, rows, a.value_size));
    int32_t* counter = a.counters + item.tile * a.shape.kv_heads + head;
    if (__atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) == item.num_partials) {
      __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
      merge_partials(a, item, head, group, partial_floats, total);
    }
    return;
  }
  clear(total, rows);
  for (int64_t at = first; at < item.end; at += kSplitTokens) {
    attend_span<K>(a, item, head, group, at, query, scores, span);
    merge(total, span, rows);
  }
  store_out(a, item, head, group, total);
}

inline void attention(const AttentionArgs& a) {
  const Item* items = reinterpret_cast<const Item*>(a.items);
  const int64_t group = a.heads / a.shape.kv_heads;
  int64_t max_rows = 1;
  for (int64_t i = 0; i < a.num_items; ++i)
    max_rows = max_of<int64_t>(max_rows, items[i].num_tokens * group);
  const int64_t partial_floats = running_floats(max_rows, a.value_size);
  with_kv_dtype(a.shape.dtype, [&](auto c) {
    parallel_for(a.num_items * a.shape.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        attend_item<decltype(c)>(a, items[i / a.shape.kv_heads], i % a.shape.kv_heads,
                                 partial_floats, max_rows);
    });
  });
}

}  // namespace portalm::PORTALM_ISA
