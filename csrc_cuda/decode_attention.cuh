// decode_attention: attention of one query token per request over its paged context, split over
// thread blocks.
//
//   query, out   [requests, H, D]
//   cache        one layer (CacheLayer in arguments.h)
//   items        DecodeItem [items]: ranges of contexts (arguments.h)
//
// Mapping:  one thread block per item (x) and KV head (y), for all query heads of the group, so
//           that keys and values are read once. kLanes = D / 8 lanes hold one token's row, 8
//           elements (16 bytes) each, and process kTokens tokens at a time: the scores of tokens x
//           heads are summed over lanes by halving, which leaves one score per lane for the
//           softmax. Groups of lanes are merged at the end, by shuffles and then in shared memory.
//           A request's items are merged, in order, by the thread block that finishes last. Keys
//           and values stay in registers, as no other lane needs them: staging them in shared
//           memory (cp.async) would only add traffic.
// Bound by: memory while the group is small: 2 * context * H_kv * D elements; per 8 elements of key
//           and value it takes about 26 * kDecodeGroup + 20 instructions per lane (no tensor
//           cores).
// Needs:    H / H_kv up to kDecodeGroup; D 64 or 128; block_size and item.begin in multiples of 16;
//           strides in multiples of 8 elements.
// Meaning:  Backend.attend.
// Source:   split softmax: Dao et al., "FlashDecoding", 2023; Milakov and Gimelshein, "Online
//           normalizer calculation for softmax", 2018.
// Tested:   tests/gpu/test_native.py, test_native_compiled.py
#pragma once

#include "gpu_compat.h"

namespace portalm {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInf = -__builtin_huge_valf();

__device__ constexpr int at_least_1(int x) { return x > 1 ? x : 1; }

// Sum values[0, N) over `Stride * 2` adjacent lanes. Each step halves the values that a lane holds,
// a bit of its index selecting the half, so that a lane ends with the sums of N / lanes values,
// from index lane * N / lanes on; with fewer values than lanes, adjacent lanes end with the same
// sum.
template <int N, int Stride>
__device__ inline void sum_over_lanes(float* values) {
  if constexpr (Stride > 0) {
    if constexpr (N > 1) {
      const bool is_upper = lane_index() & Stride;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const float kept = is_upper ? values[N / 2 + i] : values[i];
        const float given = is_upper ? values[i] : values[N / 2 + i];
        values[i] = kept + shuffle_xor(given, Stride);
      }
    } else {
      values[0] += shuffle_xor(values[0], Stride);
    }
    sum_over_lanes<at_least_1(N / 2), Stride / 2>(values);
  }
}

// T: dtype of query, cache and out; D: head size. Groups smaller than kDecodeGroup execute the same
// instructions but read no more memory.
template <typename T, int D>
struct DecodeAttention {
  static constexpr int G = kDecodeGroup;
  static constexpr int kLanes = D / kVector;
  static constexpr int kTokens = 4;                           // of a group of lanes at a time
  static constexpr int kScores = kTokens * G;                 // index: head * kTokens + token
  static constexpr int kHeld = at_least_1(kScores / kLanes);  // scores of a lane, all of one head
  static constexpr int kSameHead = kLanes / G;                // adjacent lanes of one head
  static constexpr int kSameScore = kLanes * kHeld / kScores;
  static constexpr int kGroups = kDecodeThreads / kLanes;
  static constexpr int kWaves = kDecodeThreads / kWave;
  static_assert(kLanes <= kWave && kSameHead >= 1 && kHeld <= kTokens);

  // The result of a range of context: for each head the largest score, the sum of 2^(score -
  // largest), and the values weighted by it. A lane holds 8 dimensions of every head in `values`;
  // `largest` and `sum` belong to the head of the lane's scores.
  struct State {
    float values[G][kVector];
    float largest;
    float sum;
  };

  const DecodeAttentionArgs& a;
  int kv_head;
  DecodeItem item;

  __device__ static int lane() { return thread_index() % kLanes; }
  __device__ static int my_head() { return lane() / kSameHead; }
  // Index of the first lane in this group of lanes that holds scores of `head`.
  __device__ static int lane_of_head(int head) {
    return lane_index() / kLanes * kLanes + head * kSameHead;
  }

  __device__ void load_query(float (&query)[G][kVector]) const {
    for (int g = 0; g < G; ++g) {
      const int64_t head = int64_t{kv_head} * a.group_size + g;
      Bytes16 v = {};
      if (g < a.group_size)
        v = load(vector_at(a.query, item.request * a.query_stride + head * D + lane() * kVector));
      T::unpack(v, query[g]);
      for (float& x : query[g]) x *= a.scale;
    }
  }

  // Apply soft cap and ALiBi to a score and convert it to base 2; -inf outside the item or window.
  __device__ float finish_score(float score, int token, int begin, float slope) const {
    if (a.soft_cap > 0) {  // cap * tanh(score / cap)
      const float e = exp2_of(score * (2 * kLog2E) / a.soft_cap);
      score = a.soft_cap - 2 * a.soft_cap / (e + 1);
    }
    score += slope * static_cast<float>(token - (a.seq_lens[item.request] - 1));
    return token >= begin && token < item.end ? score * kLog2E : kMinusInf;
  }

  __device__ void attend(State& state) const {
    float query[G][kVector];
    load_query(query);
    int begin = item.begin;
    if (a.window > 0) begin = max_of(begin, a.seq_lens[item.request] - a.window);
    const int head = kv_head * a.group_size + my_head();
    const float slope = a.slopes && my_head() < a.group_size ? a.slopes[head] : 0.0f;

    const int32_t* table = a.block_table + item.request * a.table_stride;
    const int64_t in_row = kv_head * a.cache.head_stride + lane() * kVector;
    constexpr int kStep = kGroups * kTokens;
    const int first = (begin & -kTokens) + thread_index() / kLanes * kTokens;
    int block = first < item.end ? table[first / a.cache.block_size] : 0;

    // all lanes take part in every iteration, as shuffles need them; tokens past the end get -inf
    for (int base = begin & -kTokens; base < item.end; base += kStep) {
      const int token = base + thread_index() / kLanes * kTokens;  // the first of kTokens
      const int64_t place =
          block * a.cache.block_stride + token % a.cache.block_size * a.cache.token_stride + in_row;
      Bytes16 keys[kTokens], values[kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {  // unused memory may hold NaN, so it is not read
        const bool is_there = token + t >= begin && token + t < item.end;
        const int64_t at = place + t * a.cache.token_stride;
        keys[t] = is_there ? load_stream(vector_at(a.cache.key, at)) : Bytes16{};
        values[t] = is_there ? load_stream(vector_at(a.cache.value, at)) : Bytes16{};
      }
      const int next = token + kStep;  // load its block number ahead of time
      block = next < item.end ? table[next / a.cache.block_size] : 0;

      float scores[kScores];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float key[kVector];
        T::unpack(keys[t], key);
#pragma unroll
        for (int g = 0; g < G; ++g) {
          float dot = 0;
#pragma unroll
          for (int i = 0; i < kVector; ++i) dot += query[g][i] * key[i];
          scores[g * kTokens + t] = dot;
        }
      }
      sum_over_lanes<kScores, kLanes / 2>(scores);
      const int held = lane() / kSameScore * kHeld % kTokens;  // token of scores[0]
      for (int i = 0; i < kHeld; ++i)
        scores[i] = finish_score(scores[i], token + held + i, begin, slope);
      rescale(state, scores);
      add_values(state, scores, values);
    }
  }

  // Update `largest` with the new scores and turn them into weights.
  __device__ void rescale(State& state, float (&scores)[kScores]) const {
    float largest = state.largest;
    for (int i = 0; i < kHeld; ++i) largest = max_of(largest, scores[i]);
#pragma unroll
    for (int offset = kSameHead / 2; offset > 0; offset /= 2)
      largest = max_of(largest, shuffle_xor(largest, offset));
    if (any_lane(largest > state.largest)) rescale_to(largest, state);
    const float base = largest == kMinusInf ? 0.0f : largest;
    for (int i = 0; i < kHeld; ++i) {
      scores[i] = exp2_of(scores[i] - base);
      state.sum += scores[i];
    }
  }

  __device__ void rescale_to(float largest, State& state) const {
    const float factor = largest == kMinusInf ? 0.0f : exp2_of(state.largest - largest);
    state.largest = largest;
    state.sum *= factor;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float of_head = shuffle(factor, lane_of_head(g));
      for (float& x : state.values[g]) x *= of_head;
    }
  }

  __device__ void add_values(State& state, const float (&weights)[kScores],
                             const Bytes16 (&values)[kTokens]) const {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float value[kVector];
      T::unpack(values[t], value);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const int score = g * kTokens + t;
        const int holder = lane_index() / kLanes * kLanes + score / kHeld * kSameScore;
        const float weight = shuffle(weights[score % kHeld], holder);
#pragma unroll
        for (int i = 0; i < kVector; ++i) state.values[g][i] += weight * value[i];
      }
    }
  }

  // Merge the states of all lanes of the wave; every group of lanes ends with the result.
  __device__ void merge_wave(State& state) const {
#pragma unroll
    for (int offset = kSameScore; offset < kSameHead; offset *= 2)
      state.sum += shuffle_xor(state.sum, offset);
    float largest = state.largest;
#pragma unroll
    for (int offset = kLanes; offset < kWave; offset *= 2)
      largest = max_of(largest, shuffle_xor(largest, offset));
    rescale_to(largest, state);
#pragma unroll
    for (int offset = kLanes; offset < kWave; offset *= 2) {
      state.sum += shuffle_xor(state.sum, offset);
      for (int g = 0; g < G; ++g)
        for (float& x : state.values[g]) x += shuffle_xor(x, offset);
    }
  }

  // Floats of one part for one head: D weighted values, the largest score, the sum.
  static constexpr int kPart = D + 2;

  // Merge `count` parts of one head, `stride` floats apart, in order: the largest score, the sum,
  // and the 8 dimensions of the weighted values at `index`.
  __device__ static void merge_parts(const float* parts, int count, int64_t stride, int index,
                                     float& largest, float& sum, float (&values)[kVector]) {
    for (int i = 0; i < count; ++i) largest = max_of(largest, parts[i * stride + D]);
    for (int i = 0; i < count; ++i) {
      const float* part = parts + i * stride;
      const float factor = part[D] == kMinusInf ? 0.0f : exp2_of(part[D] - largest);
      sum += factor * part[D + 1];
      for (int j = 0; j < kVector; ++j) values[j] += factor * part[index + j];
    }
  }

  // Merge the parts of every head and write one part or, if `is_last`, the output.
  __device__ void merge(const float* parts, int count, int64_t stride, bool is_last,
                        float* out_part) const {
    for (int vector = thread_index(); vector < G * kLanes; vector += kDecodeThreads) {
      const int g = vector / kLanes, index = vector % kLanes * kVector;
      if (g >= a.group_size) return;
      const int head = kv_head * a.group_size + g;
      float largest = kMinusInf, sum = 0, values[kVector] = {};
      if (is_last && a.sinks) {
        largest = a.sinks[head] * kLog2E;
        sum = 1;
        for (int i = 0; i < count; ++i) {
          const float other = parts[g * kPart + i * stride + D];
          if (other > largest) {
            sum *= exp2_of(largest - other);
            largest = other;
          }
        }
      }
      merge_parts(parts + g * kPart, count, stride, index, largest, sum, values);
      if (is_last) {
        const float scale = sum > 0 ? 1 / sum : 0.0f;
        for (float& x : values) x *= scale;
        const int64_t row = (int64_t{item.request} * a.num_kv_heads * a.group_size + head) * D;
        store(vector_at(a.out, row + index), T::pack(values));
      } else {
        for (int j = 0; j < kVector; ++j) out_part[g * kPart + index + j] = values[j];
        if (index == 0) {
          out_part[g * kPart + D] = largest;
          out_part[g * kPart + D + 1] = sum;
        }
      }
    }
  }

  __device__ void run() const {
    PORTALM_SHARED(float, parts, kWaves * G * kPart);
    PORTALM_SHARED(int32_t, arrived, 1);
    State state = {{}, kMinusInf, 0};
    attend(state);
    merge_wave(state);

    const int wave = thread_index() / kWave;
    if (lane_index() < kLanes) {
      for (int g = 0; g < G; ++g)
        for (int i = 0; i < kVector; ++i)
          parts[(wave * G + g) * kPart + lane() * kVector + i] = state.values[g][i];
      if (lane() % kSameHead == 0) {
        parts[(wave * G + my_head()) * kPart + D] = state.largest;
        parts[(wave * G + my_head()) * kPart + D + 1] = state.sum;
      }
    }
    block_barrier();
    const int64_t stride = int64_t{a.group_size} * kPart;  // of one item and KV head
    float* const out_part =
        item.count == 1 ? nullptr
                        : a.partials + (block_x() * int64_t{a.num_kv_heads} + kv_head) * stride;
    merge(parts, kWaves, G * kPart, item.count == 1, out_part);
    if (item.count == 1) return;

    device_fence();
    block_barrier();
    int32_t* const counter = a.counters + int64_t{item.request} * a.num_kv_heads + kv_head;
    if (thread_index() == 0) *arrived = atomic_add(counter, 1);
    block_barrier();
    if (*arrived != item.count - 1) return;
    device_fence();
    const float* all = a.partials + (item.first * int64_t{a.num_kv_heads} + kv_head) * stride;
    merge(all, item.count, a.num_kv_heads * stride, true, nullptr);
    if (thread_index() == 0) *counter = 0;  // ready for the next layer
  }
};

template <typename T, int D>
__device__ void decode_attention(const DecodeAttentionArgs& a) {
  wait_for_inputs();
  const DecodeItem item = a.items[block_x()];
  if (item.count > 0) DecodeAttention<T, D>{a, block_y(), item}.run();
}

}  // namespace portalm
