// attention: causal attention of this step's query tokens over their requests' paged context.
//
//   query        [T, H, D]; out the same; cache as in kv_cache.h; block_table int32 [S, MB]
//   items        int32 [N, kItemFields], made by backends/cpu/attention.py: a tile of query tokens
//                of one request against all of its context or one split of it
//
// Mapping:  the team takes (item, KV head) pairs, most work first. All query heads of a KV head are
//           rows of one tile, so that each key and value is loaded once for all of them.
// Bound by: memory in decode (each key and value is read once), multiply-adds in prefill.
// Meaning:  ReferenceBackend.attend. A row's arithmetic is a function of its position alone: scores
//           are taken in spans of kSplit tokens from the beginning of the context, each span has its
//           own softmax, and spans are merged in order, whether one thread did them all or each
//           another. So a result does not depend on the batch or on how a prompt was chunked.
// Needs:    block sizes that divide kSplit. Slots past a request's context may hold anything, NaN
//           too: a token that a row may not see never shows in it.
#pragma once

#include "kv_cache.h"
#include "linear.h"

namespace portalm::PORTALM_ISA {

constexpr int64_t kSplit = 256;  // SPLIT_TOKENS in backends/cpu/attention.py
constexpr int kItemFields = 10;
constexpr int kRowTile = kLanes == 16 ? 8 : 4;

struct Item {
  int32_t request, first_token, num_tokens, position, begin, end;
  int32_t partial, tile, first_partial, num_partials;
};
static_assert(sizeof(Item) == kItemFields * sizeof(int32_t));

// Softmax over one span or more: largest score, sum of weights, weighted values.
struct Running {
  float* largest;  // [rows]
  float* weight;   // [rows]
  float* value;    // [rows, D]
};

PORTALM_INLINE Running running_at(float* p, int64_t rows) { return {p, p + rows, p + 2 * rows}; }
PORTALM_INLINE int64_t running_floats(int64_t rows, int64_t head_size) {
  return rows * (head_size + 2);
}

// scores[r][b] = query[r] . keys[:, b] for one block, R rows.
template <int R, typename K>
PORTALM_INLINE void block_scores(const float* query, const K* keys, float* scores, int64_t head_size,
                                 int64_t block_size) {
  int64_t b = 0;
  for (; b + 2 * kLanes <= block_size; b += 2 * kLanes) {
    Vec acc[R][2] = {};
    for (int64_t d = 0; d < head_size; ++d) {
      const Vec k0 = load(keys + d * block_size + b), k1 = load(keys + d * block_size + b + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec q = splat(query[r * head_size + d]);
        acc[r][0] += q * k0;
        acc[r][1] += q * k1;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) store(scores + r * kSplit + b + i * kLanes, acc[r][i]);
  }
  for (; b + kLanes <= block_size; b += kLanes) {
    Vec acc[R] = {};
    for (int64_t d = 0; d < head_size; ++d) {
      const Vec k = load(keys + d * block_size + b);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] += splat(query[r * head_size + d]) * k;
    }
    for (int r = 0; r < R; ++r) store(scores + r * kSplit + b, acc[r]);
  }
  for (; b < block_size; ++b)  // blocks that are not a multiple of a vector
    for (int r = 0; r < R; ++r) {
      float s = 0;
      for (int64_t d = 0; d < head_size; ++d)
        s += query[r * head_size + d] * to_float(keys[d * block_size + b]);
      scores[r * kSplit + b] = s;
    }
}

// value[r] += sum over the block's tokens [from, to) of probs[r][b] * values[b], R rows.
template <int R, typename K>
PORTALM_INLINE void block_values(const float* probs, const K* values, float* value,
                                 int64_t head_size, int64_t from, int64_t to) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= head_size; d += 2 * kLanes) {
    Vec acc[R][2];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) acc[r][i] = load(value + r * head_size + d + i * kLanes);
    for (int64_t b = from; b < to; ++b) {
      const Vec v0 = load(values + b * head_size + d), v1 = load(values + b * head_size + d + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec p = splat(probs[r * kSplit + b]);
        acc[r][0] += p * v0;
        acc[r][1] += p * v1;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) store(value + r * head_size + d + i * kLanes, acc[r][i]);
  }
  for (; d < head_size; ++d)
    for (int r = 0; r < R; ++r) {
      float v = value[r * head_size + d];
      for (int64_t b = from; b < to; ++b)
        v += probs[r * kSplit + b] * to_float(values[b * head_size + d]);
      value[r * head_size + d] = v;
    }
}

// Call body<R>(row) for all rows, kRowTile at a time.
template <int R, typename Body>
PORTALM_INLINE void for_rows(int64_t row, int64_t rows, const Body& body) {
  for (; row + R <= rows; row += R) body.template operator()<R>(row);
  if constexpr (R > 1) {
    if (row < rows) for_rows<R / 2>(row, rows, body);
  }
}

// Tokens [from, to) of the context that row `r` of an item may see.
struct Seen {
  int64_t from, to;
};
PORTALM_INLINE Seen seen_by(const AttentionArgs& a, const Item& item, int64_t group, int64_t r) {
  const int64_t position = item.position + r / group;
  return {a.window ? max_of<int64_t>(position - a.window + 1, 0) : 0, position + 1};
}

// Scores of a span become weights; its largest score and their sum are kept. Tokens that a row may
// not see weigh 0.
inline void span_softmax(const AttentionArgs& a, const Item& item, int64_t group, int64_t span,
                         int64_t begin, int64_t end, int64_t rows, float* scores, Running out) {
  const int64_t width = (end - span + kLanes - 1) / kLanes * kLanes;  // at most kSplit
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scores + r * kSplit;
    const Seen seen = seen_by(a, item, group, r);
    const int64_t from = max_of(begin, seen.from) - span;
    const int64_t to = min_of(end, seen.to) - span;
    const float hidden = -__builtin_inff();
    if (a.soft_cap > 0)
      for (int64_t i = max_of<int64_t>(from, 0); i < to; ++i)
        s[i] = a.soft_cap * __builtin_tanhf(s[i] / a.soft_cap);
    for (int64_t i = 0; i < min_of(from, width); ++i) s[i] = hidden;
    for (int64_t i = max_of<int64_t>(to, 0); i < width; ++i) s[i] = hidden;
    Vec best = splat(hidden);
    for (int64_t i = 0; i < width; i += kLanes) best = max_of(best, load(s + i));
    const float largest = max_lane(best);
    out.largest[r] = largest;
    Vec weight{};
    if (largest > hidden) {
      for (int64_t i = 0; i < width; i += kLanes) {
        const Vec p = exp_of(load(s + i) - splat(largest));
        store(s + i, p);
        weight += p;
      }
    } else {
      for (int64_t i = 0; i < width; ++i) s[i] = 0;
    }
    out.weight[r] = sum(weight);
  }
}

// One more span behind those merged before.
inline void merge(Running total, Running span, int64_t rows, int64_t head_size) {
  const float none = -__builtin_inff();
  for (int64_t r = 0; r < rows; ++r) {
    if (span.largest[r] == none) continue;
    const float largest = max_of(total.largest[r], span.largest[r]);
    const float keep = total.largest[r] == none ? 0.0f : exp_of(splat(total.largest[r] - largest))[0];
    const float add = exp_of(splat(span.largest[r] - largest))[0];
    total.largest[r] = largest;
    total.weight[r] = total.weight[r] * keep + span.weight[r] * add;
    float* to = total.value + r * head_size;
    const float* from = span.value + r * head_size;
    int64_t d = 0;
    for (; d + kLanes <= head_size; d += kLanes)
      store(to + d, load(to + d) * splat(keep) + load(from + d) * splat(add));
    for (; d < head_size; ++d) to[d] = to[d] * keep + from[d] * add;
  }
}

inline void clear(Running r, int64_t rows, int64_t head_size) {
  for (int64_t i = 0; i < rows; ++i) r.largest[i] = -__builtin_inff();
  memset(r.weight, 0, rows * sizeof(float));
  memset(r.value, 0, rows * head_size * sizeof(float));
}

// The rows of `item`, scaled, in float32: row t * group + g is head g of token t.
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
  const int64_t head_size = a.shape.head_size;
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = 0; i < item.num_tokens; ++i) {
      T* to = static_cast<T*>(a.out) +
              ((item.first_token + i) * a.heads + head * group) * head_size;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t r = i * group + g;
        const float scale = 1.0f / total.weight[r];
        for (int64_t d = 0; d < head_size; ++d)
          put(to + g * head_size + d, total.value[r * head_size + d] * scale);
      }
    }
  });
}

// One span, [span, span + kSplit) of the context, of all rows of an item.
template <typename K>
inline void attend_span(const AttentionArgs& a, const Item& item, int64_t head, int64_t group,
                        int64_t span, const float* query, float* scores, Running out) {
  const KVShape& s = a.shape;
  const int64_t rows = item.num_tokens * group;
  const int64_t begin = max_of<int64_t>(item.begin, span);
  const int64_t end = min_of<int64_t>(item.end, span + kSplit);
  const int32_t* table = a.block_table + item.request * a.max_blocks;
  const K* cache = static_cast<const K*>(a.cache);
  const int64_t first = begin / s.block_size, last = (end + s.block_size - 1) / s.block_size;
  for (int64_t block = first; block < last; ++block) {
    const K* keys = cache + keys_at(s, table[block], head);
    for_rows<kRowTile>(0, rows, [&]<int R>(int64_t r) {
      block_scores<R>(query + r * s.head_size, keys, scores + r * kSplit + block * s.block_size - span,
                      s.head_size, s.block_size);
    });
  }
  span_softmax(a, item, group, span, begin, end, rows, scores, out);
  memset(out.value, 0, rows * s.head_size * sizeof(float));
  for (int64_t block = first; block < last; ++block) {
    const K* values = cache + keys_at(s, table[block], head) + head_elements(s);
    const int64_t start = block * s.block_size;
    const float* weights = scores + start - span;
    // where some row does not see all of the block each has its own bounds: a weight of 0 would not
    // hide a value that is not finite
    const bool all_seen = seen_by(a, item, group, 0).to >= min_of(start + s.block_size, end) &&
                          seen_by(a, item, group, rows - 1).from <= start;
    if (all_seen) {
      const int64_t count = min_of(s.block_size, end - start);
      for_rows<kRowTile>(0, rows, [&]<int R>(int64_t r) {
        block_values<R>(weights + r * kSplit, values, out.value + r * s.head_size, s.head_size, 0,
                        count);
      });
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Seen seen = seen_by(a, item, group, r);
      block_values<1>(weights + r * kSplit, values, out.value + r * s.head_size, s.head_size,
                      max_of<int64_t>(seen.from - start, 0),
                      min_of(min_of(seen.to, end) - start, s.block_size));
    }
  }
}

// Partial results of a split tile, in order; by the member that finished its last one.
inline void merge_partials(const AttentionArgs& a, const Item& item, int64_t head, int64_t group,
                           int64_t partial_floats, Running total) {
  const int64_t rows = item.num_tokens * group;
  clear(total, rows, a.shape.head_size);
  for (int64_t i = 0; i < item.num_partials; ++i) {
    const int64_t at = (item.first_partial + i) * a.shape.kv_heads + head;
    merge(total, running_at(a.partials + at * partial_floats, rows), rows, a.shape.head_size);
  }
  store_out(a, item, head, group, total);
}

template <typename K>
inline void attend_item(const AttentionArgs& a, const Item& item, int64_t head,
                        int64_t partial_floats, int64_t max_rows) {
  const int64_t group = a.heads / a.shape.kv_heads, head_size = a.shape.head_size;
  const int64_t rows = item.num_tokens * group;
  float* memory = scratch(max_rows * (head_size + kSplit) + 2 * running_floats(max_rows, head_size) +
                          4 * kLanes);
  float* query = memory;
  float* scores = query + max_rows * head_size;
  const Running span = running_at(scores + max_rows * kSplit, rows);
  const Running total = running_at(span.largest + running_floats(max_rows, head_size), rows);
  load_query(a, item, head, group, query);
  const int64_t first = item.begin / kSplit * kSplit;
  if (item.partial >= 0) {
    const int64_t at = item.partial * a.shape.kv_heads + head;
    attend_span<K>(a, item, head, group, first, query, scores,
                   running_at(a.partials + at * partial_floats, rows));
    int32_t* counter = a.counters + item.tile * a.shape.kv_heads + head;
    if (__atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) == item.num_partials) {
      __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
      merge_partials(a, item, head, group, partial_floats, total);
    }
    return;
  }
  clear(total, rows, head_size);
  for (int64_t at = first; at < item.end; at += kSplit) {
    attend_span<K>(a, item, head, group, at, query, scores, span);
    merge(total, span, rows, head_size);
  }
  store_out(a, item, head, group, total);
}

inline void attention(const AttentionArgs& a) {
  const Item* items = reinterpret_cast<const Item*>(a.items);
  const int64_t group = a.heads / a.shape.kv_heads;
  int64_t max_rows = 1;
  for (int64_t i = 0; i < a.num_items; ++i)
    max_rows = max_of<int64_t>(max_rows, items[i].num_tokens * group);
  const int64_t partial_floats = running_floats(max_rows, a.shape.head_size);
  with_dtype(a.shape.dtype, [&](auto c) {
    parallel_for(a.num_items * a.shape.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        attend_item<decltype(c)>(a, items[i / a.shape.kv_heads], i % a.shape.kv_heads,
                                 partial_floats, max_rows);
    });
  });
}

}  // namespace portalm::PORTALM_ISA
