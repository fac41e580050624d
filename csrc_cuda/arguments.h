// The arguments of each kernel: plain numbers and device addresses, passed by value. Device and
// host code share this file. Strides are in elements unless their name says bytes.
#pragma once

#include <stdint.h>

namespace portalm {

// Threads per block and work per thread, from which the grid follows.
constexpr int kVector = 8;  // elements that a thread loads or stores at a time
constexpr int kDecodeThreads = 128;
constexpr int kDecodeGroup = 4;  // maximum number of query heads per KV head

enum DType : int64_t { kHalf = 0, kBFloat16 = 1 };

// One layer of the paged cache. Each head's D elements are contiguous.
struct CacheLayer {
  const void* key;
  const void* value;
  int64_t block_stride;
  int64_t token_stride;
  int64_t head_stride;
  int32_t block_size;
};

// A range of one request's context, int32: the work of one thread block.
struct DecodeItem {
  int32_t request;  // row of its query, block table and output
  int32_t begin;    // tokens [begin, end); begin is a multiple of 16
  int32_t end;
  int32_t first;  // index of the request's first item
  int32_t count;  // number of the request's items, which are consecutive; 0: padding
};

struct DecodeAttentionArgs {
  CacheLayer cache;
  const void* query;
  void* out;  // [requests, H, D], contiguous
  const int32_t* block_table;
  const DecodeItem* items;
  const int32_t* seq_lens;
  float* partials;      // [items, H_kv, group, D + 2]; used by requests with several items
  int32_t* counters;    // [requests, H_kv], 0 before and after
  const float* slopes;  // [H], or null
  const float* sinks;   // [H], or null
  int64_t query_stride;
  int64_t table_stride;
  float scale;
  float soft_cap;  // 0: none
  int32_t window;  // tokens attended to, including the query's own; 0: all
  int32_t num_kv_heads;
  int32_t group_size;  // query heads per KV head
};

}  // namespace portalm
