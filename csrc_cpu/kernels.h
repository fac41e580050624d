// The table of kernels: plain functions over structs of raw pointers and sizes, the same for every
// instruction set, so that a step can be replayed without Python.
//
// To add an operation: list its arguments in arguments.h (the struct here, its Python function and
// its place in a recorded step follow from that); put its code in a header of its own (over simd.h,
// in namespace portalm::PORTALM_ISA), included by kernels.cpp; check it in
// tests/unit/test_cpu_kernels.py.
#pragma once

#include <cstdint>

namespace portalm {

// Element types, with the names that Python uses. The last two occur only in KV caches.
#define PORTALM_DTYPES(ENTRY) \
  ENTRY(f32, "float32")       \
  ENTRY(bf16, "bfloat16")     \
  ENTRY(f16, "float16")       \
  ENTRY(i8, "int8")           \
  ENTRY(f8, "fp8")

// How a linear weight is packed: plain elements as in DType, integers of 8 or 4 bits with scales
// (and minimums) by groups (linear_quantized.h), or `blocks`: bfloat16 as integers, nearly exact
// and on some CPUs faster. `_x16` formats multiply by activations of 15 bits, the others of 8.
#define PORTALM_FORMATS(ENTRY)    \
  ENTRY(f32, "float32")           \
  ENTRY(bf16, "bfloat16")         \
  ENTRY(f16, "float16")           \
  ENTRY(q8, "q8")                 \
  ENTRY(q4, "q4")                 \
  ENTRY(q4_min, "q4_min")         \
  ENTRY(q8_x16, "q8_x16")         \
  ENTRY(q4_x16, "q4_x16")         \
  ENTRY(q4_min_x16, "q4_min_x16") \
  ENTRY(q8_16_x16, "q8_16_x16")   \
  ENTRY(blocks, "blocks")         \
  ENTRY(q8_min_x16, "q8_min_x16") \
  ENTRY(q8_16_min_x16, "q8_16_min_x16")

#define PORTALM_ENUMERATOR(enumerator, name) enumerator,
enum class DType : int { PORTALM_DTYPES(PORTALM_ENUMERATOR) };
enum class Format : int { PORTALM_FORMATS(PORTALM_ENUMERATOR) };
#undef PORTALM_ENUMERATOR

constexpr int64_t kDTypeBytes[] = {4, 2, 2, 1, 1};

// One layer of the KV cache (kv_cache.h): type, member, and its name as an argument.
#define PORTALM_KV_SHAPE_MEMBERS(MEMBER)  \
  MEMBER(DType, dtype, cache_dtype)       \
  MEMBER(int64_t, num_blocks, num_blocks) \
  MEMBER(int64_t, block_size, block_size) \
  MEMBER(int64_t, kv_heads, kv_heads)     \
  MEMBER(int64_t, head_size, head_size)   \
  MEMBER(bool, shares_values, shares_values) /* a token's value is its key: one plane */

struct KVShape {
#define PORTALM_MEMBER(Type, member, name) Type member;
  PORTALM_KV_SHAPE_MEMBERS(PORTALM_MEMBER)
#undef PORTALM_MEMBER
};

// A work item of attention, int32: a tile of one request's query tokens against tokens [begin, end)
// of its context.
#define PORTALM_ITEM_MEMBERS(MEMBER)                                                         \
  MEMBER(request)     /* row of the block table */                                           \
  MEMBER(first_token) /* its first query token */                                            \
  MEMBER(num_tokens)  /* its number of query tokens */                                       \
  MEMBER(position)    /* position of the first one in the context */                         \
  MEMBER(begin)                                                                              \
  MEMBER(end)                                                                                \
  MEMBER(partial)       /* partial result to write; -1: the item covers the whole context */ \
  MEMBER(tile)          /* index of its tile among those that are split */                   \
  MEMBER(first_partial) /* the tile's first partial result */                                \
  MEMBER(num_partials)  /* the tile's number of partial results */

struct AttentionItem {
#define PORTALM_MEMBER(name) int32_t name;
  PORTALM_ITEM_MEMBERS(PORTALM_MEMBER)
#undef PORTALM_MEMBER
};

constexpr int64_t kSplitTokens = 256;  // context of one softmax; partial results cover at most this
constexpr int kMaxLanes = 16;          // floats of the widest vector of any instruction set

// Floats of one partial result of `rows` rows: largest score, sum of weights and weighted values.
// Always inlined, as instruction sets must not share a compiled function (simd.h).
__attribute__((always_inline)) inline int64_t partial_floats(int64_t rows, int64_t value_size,
                                                             int lanes) {
  return rows * ((value_size + lanes - 1) / lanes * lanes + 2);
}

#define PORTALM_KERNEL(name, Args) struct Args {
#define PORTALM_ARGUMENT(role, Type, name) Type name;
#define PORTALM_KV_SHAPE(role, shape) KVShape shape;
#define PORTALM_END \
  }                 \
  ;
#include "arguments.h"

struct Kernels {
  const char* name;
  int lanes;
  int64_t (*packed_bytes)(Format format, int64_t n, int64_t k);
#define PORTALM_KERNEL(name, Args) void (*name)(const Args&);
#include "arguments.h"
};

// The kernels in use: the best that the CPU can run, or those that PORTALM_CPU_ISA names.
const Kernels& kernels();

}  // namespace portalm
