// What each kernel is given: plain numbers and addresses on the device, passed by value. Device and
// host code share this file. Strides count elements unless they say bytes; codes name dtypes.
#pragma once

#include <stdint.h>

namespace portalm {

// Threads of a block, and what one of them does: the grid follows from it.
constexpr int kVector = 8;  // elements that a thread moves at a time
constexpr int kCopyThreads = 256;
constexpr int kCopyVectors = 4;  // of 16 bytes
constexpr int kWriteThreads = 128;
constexpr int kDecodeThreads = 128;
constexpr int kDecodeGroup = 4;  // query heads of a KV head, at most
constexpr int kSampleThreads = 1024;

enum DType : int64_t { kHalf = 0, kBFloat16 = 1 };

struct KvCopyArgs {
  char* cache;
  int64_t piece_stride;  // bytes from one layer's keys (or values) to the next such piece
  int64_t block_bytes;   // of one block within a piece, which are contiguous
  const int32_t* source;
  const int32_t* destination;
};

// One layer of the paged cache: block, token and head of an element's place; D is contiguous.
struct CacheLayer {
  const void* key;
  const void* value;
  int64_t block_stride;
  int64_t token_stride;
  int64_t head_stride;
  int32_t block_size;
};

struct KvWriteArgs {
  CacheLayer cache;
  const void* query;  // rotated into query_out; neither is looked at where num_heads is 0
  const void* key;
  const void* value;
  void* query_out;
  const int32_t* slots;
  const int32_t* positions;
  const float* cos_sin;  // [max_position, rotary_dim]: cosines, then sines
  int64_t query_stride;  // of a token
  int64_t key_stride;
  int64_t value_stride;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_size;
  int32_t rotary_dim;  // 0: keys are stored as they are
  int32_t is_interleaved;
};

// A stretch of one request's context, int32: what one block of threads attends to.
struct DecodeItem {
  int32_t request;  // its query is the row of this number
  int32_t begin;    // tokens [begin, end); begin is a multiple of 16
  int32_t end;
  int32_t first;  // item of this request that comes first, and how many it has, side by side;
  int32_t count;  // 0: padding, nothing to do
};

struct DecodeAttentionArgs {
  CacheLayer cache;
  const void* query;
  void* out;  // [requests, H, D], contiguous
  const int32_t* block_table;
  const DecodeItem* items;
  const int32_t* seq_lens;
  float* partials;      // [items, H_kv, group, D + 2] where some request has several items
  int32_t* counters;    // [requests, H_kv], 0 before and after
  const float* slopes;  // [H], or null
  const float* sinks;   // [H], or null
  int64_t query_stride;
  int64_t table_stride;
  float scale;
  float soft_cap;  // 0: none
  int32_t window;  // tokens seen, itself included; 0: all
  int32_t num_kv_heads;
  int32_t group_size;  // query heads of one KV head
};

struct SampleArgs {
  const float* logits;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seed;
  const int64_t* position;
  int32_t* out;
  int64_t stride;
  int32_t vocab_size;
};

}  // namespace portalm
