// sample: sample one token per row of logits by temperature, top_k, top_p and min_p.
//
//   logits   float32 [R, V]; parameters [R] (portalm.backend.SampleParams)
//   out      int32 [R]; -1 for a row with a NaN, or with -inf only
//
// Mapping:  the team shares the rows. No sort: top_k and top_p find their thresholds by
//           partitioning candidates, and noise is computed only for tokens that could still win
//           (Gumbel noise never exceeds kMaxNoise).
// Bound by: memory: one pass over the logits if greedy, two or three otherwise.
// Meaning:  portalm_backends.portable.sampling.
// Source:   Philox: Salmon et al., SC 2011.
// Tested:   tests/unit/test_cpu_kernels.py
#pragma once

#include "parallel.h"
#include "scratch.h"

namespace portalm::PORTALM_ISA {

constexpr float kMaxNoise = 16.7f;  // -log(-log(1 - 2^-24)) is 16.64

struct Philox {
  uint32_t word[4];
};

inline Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

inline float gumbel(uint32_t bits) {
  const float uniform = (static_cast<float>(bits >> 9) + 0.5f) * 0x1p-23f;
  return -__builtin_logf(-__builtin_logf(uniform));
}

// The k-th largest (from 1) of values[0, count), by Hoare's selection; reorders the values.
inline float kth_largest(float* values, int64_t count, int64_t k) {
  int64_t low = 0, high = count - 1, target = k - 1;
  while (low < high) {
    const float pivot = values[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (values[i] > pivot) ++i;
      while (values[j] < pivot) --j;
      if (i <= j) {
        const float swapped = values[i];
        values[i++] = values[j];
        values[j--] = swapped;
      }
    }
    if (target <= j) high = j;
    else if (target >= i) low = i;
    else break;
  }
  return values[target];
}

// The largest t such that the values above t hold less than p of the probability mass: t and above
// are kept. Weighted selection over values[0, count); reorders the values.
inline float top_p_threshold(float* values, int64_t count, float largest, float p) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += __builtin_expf(values[i] - largest);
  const double wanted = p * total;
  double above = 0;
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const float pivot = values[low + (high - low) / 2];
    int64_t greater = low, equal = low, at = low;  // [low, greater) > pivot, [greater, equal) ==
    double weight_greater = 0, weight_equal = 0;
    for (; at < high; ++at) {
      const float v = values[at];
      if (v > pivot) {
        values[at] = values[equal];
        values[equal++] = values[greater];
        values[greater++] = v;
        weight_greater += __builtin_expf(v - largest);
      } else if (v == pivot) {
        values[at] = values[equal];
        values[equal++] = v;
        weight_equal += __builtin_expf(v - largest);
      }
    }
    if (greater > low && above + weight_greater >= wanted) {
      high = greater;
    } else if (above + weight_greater + weight_equal >= wanted || equal == high) {
      return pivot;
    } else {
      above += weight_greater + weight_equal;
      low = equal;
    }
  }
  return values[low];
}

// The smallest scaled logit that top_k, top_p and min_p keep; -inf without a filter.
inline float filter_threshold(const SampleArgs& a, int64_t row, const float* logits,
                              float temperature, float largest, float* candidates) {
  const float none = -__builtin_inff();
  const bool has_top_k = a.top_k[row] > 0 && a.top_k[row] < a.vocab;
  const bool has_top_p = a.top_p[row] < 1.0f;
  float threshold = a.min_p[row] > 0 ? largest + __builtin_logf(a.min_p[row]) : none;
  if (!has_top_k && !has_top_p) return threshold;
  int64_t count = 0;
  for (int64_t v = 0; v < a.vocab; ++v) {
    const float scaled = logits[v] / temperature;
    if (scaled >= threshold && scaled > none) candidates[count++] = scaled;
  }
  if (has_top_k && a.top_k[row] < count) {
    threshold = kth_largest(candidates, count, a.top_k[row]);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i)
      if (candidates[i] >= threshold) candidates[kept++] = candidates[i];
    count = kept;
  }
  if (has_top_p) {
    const float t = top_p_threshold(candidates, count, largest, a.top_p[row]);
    threshold = max_of(threshold, t);
  }
  return threshold;
}

inline int32_t sample_row(const SampleArgs& a, int64_t row, const float* logits, float largest,
                          float* candidates) {
  const float temperature = a.temperature[row];
  largest /= temperature;
  const float threshold = filter_threshold(a, row, logits, temperature, largest, candidates);
  const uint64_t seed = static_cast<uint64_t>(a.seed[row]);
  const uint64_t position = static_cast<uint64_t>(a.position[row]);
  float best = -__builtin_inff();
  int32_t token = -1;
  for (int64_t v = 0; v < a.vocab; v += 4) {
    const int64_t count = min_of<int64_t>(4, a.vocab - v);
    float scaled[4];
    bool may_win = false;
    for (int64_t i = 0; i < count; ++i) {
      scaled[i] = logits[v + i] / temperature;
      may_win = may_win || (scaled[i] >= threshold && scaled[i] + kMaxNoise > best);
    }
    if (!may_win) continue;
    const Philox random = philox(static_cast<uint32_t>(v / 4), 0, static_cast<uint32_t>(position),
                                 static_cast<uint32_t>(position >> 32), static_cast<uint32_t>(seed),
                                 static_cast<uint32_t>(seed >> 32));
    for (int64_t i = 0; i < count; ++i) {
      if (!(scaled[i] >= threshold)) continue;
      const float noisy = scaled[i] + gumbel(random.word[i]);
      if (noisy > best) {
        best = noisy;
        token = static_cast<int32_t>(v + i);
      }
    }
  }
  return token;
}

// The largest logit of a row; NaN if any is NaN.
inline float row_max(const float* logits, int64_t count) {
  Vec best = splat(-__builtin_inff()), poison{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec x = load(logits + i);
    poison += x * splat(0.0f);  // NaN for infinities too: checked again below
    best = max_of(best, x);
  }
  float largest = max_lane(best);
  bool has_nan = sum(poison) != 0.0f;
  for (; i < count; ++i) {
    has_nan = has_nan || logits[i] != logits[i];
    largest = max_of(largest, logits[i]);
  }
  if (has_nan)
    for (i = 0; i < count; ++i)
      if (logits[i] != logits[i]) return logits[i];
  return largest;
}

inline void sample(const SampleArgs& a) {
  parallel_for(a.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* logits = a.logits + row * a.stride;
      const float largest = row_max(logits, a.vocab);
      if (!(largest > -__builtin_inff())) {
        a.out[row] = -1;
      } else if (a.temperature[row] == 0.0f) {
        int64_t v = 0;
        while (logits[v] != largest) ++v;
        a.out[row] = static_cast<int32_t>(v);
      } else {
        a.out[row] = sample_row(a, row, logits, largest, scratch(a.vocab));
      }
    }
  });
}

}  // namespace portalm::PORTALM_ISA
