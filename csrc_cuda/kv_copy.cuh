// kv_copy: copy block source[i] to destination[i] in every layer, keys and values, in one launch.
//
//   cache                 pieces (a layer's keys or its values) of contiguous blocks
//   source, destination   int32 [pairs]
//
// Mapping:  one thread block per pair (x), piece (y) and range of kCopyVectors * kCopyThreads
//           16-byte vectors (z). Adjacent lanes access adjacent vectors, and each thread issues all
//           its reads before its first write.
// Bound by: memory; moves 2 * pairs * pieces * block_bytes.
// Needs:    cache, strides and block_bytes in multiples of 16 bytes; no block is both a source and
//           a destination.
// Meaning:  Backend.kv_copy.
// Tested:   tests/gpu/test_native.py, test_native_compiled.py
#pragma once

#include "gpu_compat.h"

namespace portalm {

__device__ inline void kv_copy(const KvCopyArgs& a) {
  char* const piece = a.cache + block_y() * a.piece_stride;
  const auto* from = reinterpret_cast<const Bytes16*>(piece + a.source[block_x()] * a.block_bytes);
  auto* to = reinterpret_cast<Bytes16*>(piece + a.destination[block_x()] * a.block_bytes);

  const int64_t first = int64_t{block_z()} * kCopyVectors * kCopyThreads + thread_index();
  const int64_t num_vectors = a.block_bytes / 16;
  Bytes16 held[kCopyVectors];
#pragma unroll
  for (int i = 0; i < kCopyVectors; ++i)
    if (first + i * kCopyThreads < num_vectors)
      held[i] = load_stream(from + first + i * kCopyThreads);
#pragma unroll
  for (int i = 0; i < kCopyVectors; ++i)
    if (first + i * kCopyThreads < num_vectors) store(to + first + i * kCopyThreads, held[i]);
}

}  // namespace portalm
