// The table of kernels: plain functions over structs of raw pointers and sizes, the same for every
// instruction set, so that a step can be replayed without Python.
//
// To add an operation: write its struct here and a pointer in Kernels; its code in a header of its
// own (over simd.h, in namespace portalm::PORTALM_ISA); one line in kernels.cpp; one binding in
// bindings.cpp; its check in tests/unit/test_cpu_kernels.py.
//
// T tokens, S requests, H / H_kv query / KV heads, D head size, V vocabulary. Strides are in
// elements. DType says what a pointer points to.
#pragma once

#include <cstdint>

namespace portalm {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, f8 = 4 };  // the last two in caches

constexpr int64_t kDTypeBytes[] = {4, 2, 2};

// How a linear weight is packed; the first three as DType. What the others are: linear_quantized.h.
enum class Format : int {
  f32 = 0, bf16 = 1, f16 = 2,
  q8 = 3, q4 = 4, q4_min = 5,
  q8_x16 = 6, q4_x16 = 7, q4_min_x16 = 8, q8_16_x16 = 9,
  blocks = 10,  // of bfloat16, nearly exact; where that is not faster, bf16
  q8_min_x16 = 11, q8_16_min_x16 = 12,
};

struct PackArgs {  // linear.h, linear_quantized.h
  const void* source;  // [N, K], contiguous
  DType dtype;
  int64_t n, k;
  void* packed;  // packed_bytes(format, n, k), 64-byte aligned
  Format format;  // that of dtype, or one of 8 or 4 bits that the weight is rounded to
};

struct PackCodesArgs {  // linear_quantized.h
  const uint8_t* codes;   // [N, K]
  const float* scales;    // [N, groups]
  const float* minimums;  // [N, groups], or null where the format has none
  int64_t n, k;
  void* packed;  // packed_bytes(format, n, k), 64-byte aligned
  Format format;
};

struct LinearArgs {  // linear.h: out = x * weight^T + bias
  const void* x;  // [rows, K]
  DType x_dtype;
  int64_t rows, x_stride;
  const void* packed;
  Format format;
  int64_t n, k;
  const void* bias;  // [N] in x_dtype, or null
  void* out;  // [rows, N]
  DType out_dtype;
  int64_t out_stride;
};

struct NormArgs {  // rms_norm.h
  const void* x;         // [T, C]
  const void* residual;  // [T, C] or null: then x + residual is normed and stored in total
  const void* weight;    // [C]
  void* out;             // [T, C]
  void* total;           // [T, C] or null
  DType dtype;
  int64_t rows, columns, x_stride, residual_stride;
  float eps;
};

struct SiluMulArgs {  // silu_mul.h
  const void* gate_up;  // [T, 2 I]
  void* out;            // [T, I]
  DType dtype;
  int64_t rows, columns, stride;
};

struct MoeArgs {  // moe.h
  const void* x;  // [T, C]
  DType dtype;
  int64_t tokens, x_stride;
  const int32_t* ids;   // [T, k]
  const float* shares;  // [T, k]
  int64_t top_k;
  const int64_t* experts;  // [E, 4]: address and format of [2 I, C] and of [C, I]
  int64_t num_experts, hidden, inner;  // E, C, I
  const void* gate_up_bias;            // [E, 2 I] in dtype, or null
  const void* down_bias;               // [E, C] in dtype, or null
  float limit, alpha;                  // gpt-oss's clamp and slope; limit 0: silu(gate) * up
  void* out;                           // [T, C], contiguous
};

struct TakeRowsArgs {  // take_rows.h
  const void* x;  // [T, C]
  const int32_t* rows;  // [R]
  void* out;            // [R, C]
  int64_t num_rows, num_source_rows, row_bytes, stride_bytes;
};

struct RopeArgs {  // rope.h
  const void* query;  // [T, H, D]
  const void* key;    // [T, H_kv, D]
  void* query_out;    // [T, H, D], contiguous
  void* key_out;      // [T, H_kv, D], contiguous
  const int32_t* positions;  // [T]
  const float* cos_sin;      // [max_position, rotary_dim]: cosines, then sines
  DType dtype;
  int64_t tokens, heads, kv_heads, head_size, rotary_dim, query_stride, key_stride;
  bool is_interleaved;
};

// One layer of the KV cache, laid out as kv_cache.h says.
struct KVShape {
  DType dtype;
  int64_t num_blocks, block_size, kv_heads, head_size;
  bool shares_values;  // a token's value is its key: one plane
};

struct KVWriteArgs {  // kv_cache.h
  void* cache;  // one layer
  KVShape shape;
  const void* key;    // [T, H_kv, D]
  const void* value;  // [T, H_kv, D]
  DType dtype;
  int64_t tokens, key_stride, value_stride;
  const int32_t* slots;  // [T]
};

struct KVCopyArgs {  // kv_cache.h
  char* cache;  // all layers
  int64_t num_layers, layer_bytes, block_bytes, num_copies;
  const int32_t* source;       // [N]
  const int32_t* destination;  // [N]
};

struct KVWireArgs {  // kv_cache.h: [N, L, 2, B, H_kv, D] and back; [N, L, 1, ...] of one plane
  char* cache;
  KVShape shape;
  int64_t num_layers, layer_bytes, num_wire_blocks;
  const int32_t* blocks;  // [N]
  void* wire;
  bool is_export;
};

struct AttentionArgs {  // attention.h
  const void* query;  // [T, H, D]
  void* out;          // [T, H, V], contiguous
  DType dtype;
  int64_t query_stride, heads;
  int64_t value_size;  // V: numbers of a value; D but where values are keys
  const void* cache;  // one layer
  KVShape shape;
  const int32_t* block_table;  // [S, MB]
  int64_t max_blocks;
  const int32_t* items;  // [num_items, kItemFields], made by backends/cpu/attention.py
  int64_t num_items;
  float* partials;  // kPartialFloats(...) each, for split items
  int32_t* counters;  // one a split tile and KV head, zero before and after
  float scale;
  float soft_cap;  // 0: none
  int64_t window;  // 0: none
  const float* slopes;  // [H], ALiBi's; null: none
  const float* sinks;   // [H]; null: none
};

struct SampleArgs {  // sample.h
  const float* logits;  // [R, V]
  int64_t rows, vocab, stride;
  const float* temperature;  // [R]
  const int32_t* top_k;      // [R]
  const float* top_p;        // [R]
  const float* min_p;        // [R]
  const int64_t* seed;       // [R]
  const int64_t* position;   // [R]
  int32_t* out;              // [R]
};

struct Kernels {
  const char* name;
  int lanes;
  int64_t (*packed_bytes)(Format format, int64_t n, int64_t k);
  void (*pack)(const PackArgs&);
  void (*pack_codes)(const PackCodesArgs&);
  void (*linear)(const LinearArgs&);
  void (*rms_norm)(const NormArgs&);
  void (*silu_mul)(const SiluMulArgs&);
  void (*moe)(const MoeArgs&);
  void (*take_rows)(const TakeRowsArgs&);
  void (*rope)(const RopeArgs&);
  void (*kv_write)(const KVWriteArgs&);
  void (*kv_copy)(const KVCopyArgs&);
  void (*kv_wire)(const KVWireArgs&);
  void (*attention)(const AttentionArgs&);
  void (*sample)(const SampleArgs&);
};

// The kernels in use: the best that the CPU can run, or what PORTALM_CPU_ISA names.
const Kernels& kernels();

}  // namespace portalm
