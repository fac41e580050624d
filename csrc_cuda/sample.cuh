// sample: sample one token per row of logits by temperature, min_p, top_k, top_p and Gumbel noise,
// or choose the largest logit if the temperature is 0.
//
//   logits   float32 [R, stride]
//   out      int32 [R]; -1 for a row with a NaN, or with -inf only
//
// Mapping:  one thread block per row. No sort: with scores mapped to integers of the same order,
//           the threshold is searched 11 bits at a time, by histograms in shared memory of the
//           number of tokens (top_k) or the probability (top_p) in each bin. Probability is counted
//           in integer units of 2^-40, so that a sum does not depend on the order of its terms.
//           Noise is computed only for tokens that could still win: it never exceeds kMaxNoise.
// Bound by: latency of one multiprocessor's reads of the row (the caches hold it): 2 passes, 3 more
//           for top_k and 3 more for top_p.
// Meaning:  portalm_backends.portable.sampling, with the same random integers.
// Source:   Philox: Salmon et al., SC 2011.
// Tested:   tests/gpu/test_native.py, test_native_compiled.py
#pragma once

#include "gpu_compat.h"

namespace portalm {

constexpr int kBins = 2 * kSampleThreads;
constexpr float kMaxNoise = 16.7f;   // -log(-log(1 - 2^-24)) is 16.64
constexpr float kMinNoise = -2.82f;  // -log(-log(2^-24)) is -2.812
constexpr float kNone = -__builtin_huge_valf();

struct Philox {
  uint32_t word[4];
};

__device__ inline Philox philox(uint32_t group, uint64_t position, uint64_t seed) {
  uint32_t c0 = group, c1 = 0;
  uint32_t c2 = static_cast<uint32_t>(position), c3 = static_cast<uint32_t>(position >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
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

__device__ inline float gumbel(uint32_t bits) {
  const float uniform = (static_cast<float>(bits >> 9) + 0.5f) * 0x1p-23f;
  return -log_of(-log_of(uniform));
}

// Map a score to an integer of the same order; -0 equals 0.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_ordered(uint32_t key) {
  return bits_as<float>(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

// A key that orders tokens by score, then by lower id; NaN comes first of all.
__device__ inline uint64_t candidate(float score, uint32_t id) {
  return score != score ? ~uint64_t{0} : uint64_t{ordered(score)} << 32 | (0xFFFFFFFFu - id);
}

struct SampleShared {
  uint64_t* bins;   // [kBins]
  uint64_t* waves;  // [kSampleThreads / kWave]
  uint64_t* above;  // [2]: weight above the bin that was found; target weight
  int32_t* found;   // [1]
};

__device__ inline uint64_t block_max(uint64_t value, const SampleShared& shared) {
  for (int offset = kWave / 2; offset > 0; offset /= 2)
    value = max_of(value, shuffle_xor(value, offset));
  if (lane_index() == 0) shared.waves[thread_index() / kWave] = value;
  block_barrier();
  for (int i = 0; i < kSampleThreads / kWave; ++i) value = max_of(value, shared.waves[i]);
  block_barrier();
  return value;
}

// A row of logits, read in groups of four tokens that share a Philox block; -inf past the end.
struct Row {
  const float* logits;
  int vocab_size;
  bool is_aligned;
  float temperature;

  __device__ void load(int group, float (&x)[4]) const {
    const int id = 4 * group;
    if (is_aligned && id + 4 <= vocab_size) {
      const Bytes16 v = portalm::load(reinterpret_cast<const Bytes16*>(logits + id));
      for (int i = 0; i < 4; ++i) x[i] = bits_as<float>(v.word[i]) / temperature;
    } else {
      for (int i = 0; i < 4; ++i) x[i] = id + i < vocab_size ? logits[id + i] / temperature : kNone;
    }
  }
  __device__ int num_groups() const { return (vocab_size + 3) / 4; }
};

// The smallest score (as `ordered`), at least `floor`, such that the scores above it weigh less
// than a target. `weigh` returns the weight of a score; `wanted` turns the total weight into the
// target.
template <typename Weigh, typename Wanted>
__device__ uint32_t smallest_kept(const Row& row, uint32_t floor, const SampleShared& shared,
                                  Weigh weigh, Wanted wanted) {
  const int thread = thread_index();
  uint32_t prefix = 0, mask = 0;
  uint64_t above = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const uint32_t num_bins = shift == 0 ? kBins / 2 : kBins;
    shared.bins[2 * thread] = shared.bins[2 * thread + 1] = 0;
    if (thread == 0) *shared.found = kBins;
    block_barrier();
    for (int group = thread; group < row.num_groups(); group += kSampleThreads) {
      float x[4];
      row.load(group, x);
      for (int i = 0; i < 4; ++i) {
        const uint32_t key = ordered(x[i]);
        if (key < floor || (key & mask) != prefix) continue;
        const uint64_t weight = weigh(x[i]);
        if (weight) shared_add(&shared.bins[key >> shift & (num_bins - 1)], weight);
      }
    }
    block_barrier();

    // bins from the highest down, two per thread: prefix sums over lanes, then over waves
    const int high = kBins - 1 - 2 * thread, low = high - 1;
    const uint64_t high_weight = shared.bins[high], low_weight = shared.bins[low];
    uint64_t before = high_weight + low_weight;
    for (int offset = 1; offset < kWave; offset *= 2) {
      const uint64_t other = shuffle(before, max_of(lane_index() - offset, 0));
      if (lane_index() >= offset) before += other;
    }
    if (lane_index() == kWave - 1) shared.waves[thread / kWave] = before;
    block_barrier();
    uint64_t total = 0;
    before -= high_weight + low_weight;
    for (int i = 0; i < kSampleThreads / kWave; ++i) {
      if (i < thread / kWave) before += shared.waves[i];
      total += shared.waves[i];
    }
    if (shift == 21 && thread == 0) shared.above[1] = wanted(total);
    block_barrier();
    const uint64_t target = shared.above[1];
    const uint64_t above_high = above + before, above_low = above_high + high_weight;
    const int mine = low_weight && above_low < target     ? low
                     : high_weight && above_high < target ? high
                                                          : kBins;
    if (mine != kBins) shared_min(shared.found, mine);
    block_barrier();
    const int found = *shared.found;
    if (found == mine && mine != kBins) shared.above[0] = mine == low ? above_low : above_high;
    block_barrier();
    if (found == kBins) return 0xFFFFFFFFu;  // no weight at all: the caller uses its largest score
    above = shared.above[0];
    prefix |= static_cast<uint32_t>(found) << shift;
    mask |= (num_bins - 1) << shift;
    block_barrier();
  }
  return prefix;
}

__device__ inline uint32_t filter_threshold(const SampleArgs& a, const Row& row, float largest,
                                            const SampleShared& shared) {
  const int64_t r = block_x();
  const float min_p = a.min_p[r], top_p = a.top_p[r];
  const int32_t top_k = a.top_k[r];
  uint32_t floor = min_p > 0 ? ordered(largest + log_of(min_p)) : ordered(kNone) + 1;
  if (top_k > 0 && top_k < a.vocab_size) {
    const uint32_t kth = smallest_kept(
        row, 0, shared, [](float) { return uint64_t{1}; },
        [=](uint64_t) { return static_cast<uint64_t>(top_k); });
    floor = max_of(floor, kth);
  }
  if (top_p < 1) {
    floor = max_of(floor, smallest_kept(
                              row, floor, shared,
                              [=](float x) {
                                const float p = exp_of(x - largest);  // NaN if both are inf
                                return p > 0 ? static_cast<uint64_t>(p * 0x1p40f) : uint64_t{0};
                              },
                              [=](uint64_t total) {
                                const double share = top_p * static_cast<double>(total);
                                return static_cast<uint64_t>(ceil_of(share));
                              }));
  }
  const uint32_t best = ordered(largest);
  return floor < best ? floor : best;
}

__device__ inline void sample(const SampleArgs& a) {
  PORTALM_SHARED(uint64_t, bins, kBins);
  PORTALM_SHARED(uint64_t, waves, kSampleThreads / kWave);
  PORTALM_SHARED(uint64_t, above, 2);
  PORTALM_SHARED(int32_t, found, 1);
  const SampleShared shared = {bins, waves, above, found};
  const int64_t r = block_x();
  Row row = {a.logits + r * a.stride, a.vocab_size, a.stride % 4 == 0, 1.0f};

  uint64_t best = 0;
  for (int group = thread_index(); group < row.num_groups(); group += kSampleThreads) {
    float x[4];
    row.load(group, x);
    for (int i = 0; i < 4; ++i)
      if (4 * group + i < a.vocab_size) best = max_of(best, candidate(x[i], 4 * group + i));
  }
  best = block_max(best, shared);
  const bool is_broken = best == ~uint64_t{0} || best >> 32 == ordered(kNone);
  const float temperature = a.temperature[r];
  if (!is_broken && temperature != 0) {
    row.temperature = temperature;
    const float largest = from_ordered(static_cast<uint32_t>(best >> 32)) / temperature;
    const uint32_t floor = filter_threshold(a, row, largest, shared);
    float to_beat = largest + kMinNoise;
    best = 0;
    for (int group = thread_index(); group < row.num_groups(); group += kSampleThreads) {
      float x[4];
      row.load(group, x);
      if (max_of(max_of(x[0], x[1]), max_of(x[2], x[3])) + kMaxNoise < to_beat) continue;
      const Philox noise = philox(group, a.position[r], a.seed[r]);
      for (int i = 0; i < 4; ++i) {
        if (ordered(x[i]) < floor) continue;
        const float score = x[i] + gumbel(noise.word[i]);
        to_beat = max_of(to_beat, score);
        best = max_of(best, candidate(score, 4 * group + i));
      }
    }
    best = block_max(best, shared);
  }
  if (thread_index() == 0)
    a.out[r] = is_broken ? -1 : static_cast<int32_t>(0xFFFFFFFFu - static_cast<uint32_t>(best));
}

}  // namespace portalm
