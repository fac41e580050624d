// The kernels and their arguments: the one list of them. kernels.h makes the structs from it,
// signatures.h what bindings.cpp and program.cpp need, and the module exports it as data
// (`_cpu.ARGUMENTS`) to backends/cpu/program.py. A file that includes it defines what it wants of
//
//   PORTALM_KERNEL(name, Args)                 begins a kernel; Args is its struct
//   PORTALM_ARGUMENT(role, Type, name)         one argument; role: see Role in signatures.h
//   PORTALM_KV_SHAPE(role, shape)              the arguments of one KVShape
//   PORTALM_END                                ends the kernel
//
// No include guard: it is included several times. T tokens, S requests, H / H_kv query / KV heads,
// D head size, V vocabulary. Strides are in elements; a DType says what a pointer points to.
#if !defined(PORTALM_KERNEL)
#define PORTALM_KERNEL(name, Args)
#endif
#if !defined(PORTALM_ARGUMENT)
#define PORTALM_ARGUMENT(role, Type, name)
#endif
#if !defined(PORTALM_KV_SHAPE)
#define PORTALM_KV_SHAPE(role, shape)
#endif
#if !defined(PORTALM_END)
#define PORTALM_END
#endif

// pack a weight, rounding it if `format` has 8 or 4 bits (linear.h, linear_quantized.h)
PORTALM_KERNEL(pack, PackArgs)
PORTALM_ARGUMENT(none, const void*, source)  // [N, K], contiguous
PORTALM_ARGUMENT(none, DType, dtype)
PORTALM_ARGUMENT(none, int64_t, n)
PORTALM_ARGUMENT(none, int64_t, k)
PORTALM_ARGUMENT(none, void*, packed)   // packed_bytes(format, n, k), 64-byte aligned
PORTALM_ARGUMENT(none, Format, format)  // that of dtype, or a quantized one
PORTALM_END

// pack the codes of a quantized checkpoint (linear_quantized.h)
PORTALM_KERNEL(pack_codes, PackCodesArgs)
PORTALM_ARGUMENT(none, const uint8_t*, codes)   // [N, K]
PORTALM_ARGUMENT(none, const float*, scales)    // [N, groups]
PORTALM_ARGUMENT(none, const float*, minimums)  // [N, groups]; null if the format has none
PORTALM_ARGUMENT(none, int64_t, n)
PORTALM_ARGUMENT(none, int64_t, k)
PORTALM_ARGUMENT(none, void*, packed)  // packed_bytes(format, n, k), 64-byte aligned
PORTALM_ARGUMENT(none, Format, format)
PORTALM_END

// out = x * weight^T + bias (linear.h, linear_quantized.h, linear_tiles.h)
PORTALM_KERNEL(linear, LinearArgs)
PORTALM_ARGUMENT(input, const void*, x)  // [rows, K]
PORTALM_ARGUMENT(fixed, DType, x_dtype)
PORTALM_ARGUMENT(rows, int64_t, rows)
PORTALM_ARGUMENT(fixed, int64_t, x_stride)
PORTALM_ARGUMENT(fixed, const void*, packed)
PORTALM_ARGUMENT(fixed, Format, format)
PORTALM_ARGUMENT(fixed, int64_t, n)
PORTALM_ARGUMENT(fixed, int64_t, k)
PORTALM_ARGUMENT(fixed, const void*, bias)  // [N] in x_dtype, or null
PORTALM_ARGUMENT(output, void*, out)        // [rows, N]
PORTALM_ARGUMENT(fixed, DType, out_dtype)
PORTALM_ARGUMENT(fixed, int64_t, out_stride)
PORTALM_END

// RMS norm over columns, optionally of a sum (rms_norm.h)
PORTALM_KERNEL(rms_norm, NormArgs)
PORTALM_ARGUMENT(input, const void*, x)         // [T, C]
PORTALM_ARGUMENT(input, const void*, residual)  // [T, C] or null: norm x + residual instead
PORTALM_ARGUMENT(fixed, const void*, weight)    // [C]
PORTALM_ARGUMENT(output, void*, out)            // [T, C]
PORTALM_ARGUMENT(output, void*, total)          // [T, C]: x + residual; null without a residual
PORTALM_ARGUMENT(fixed, DType, dtype)
PORTALM_ARGUMENT(rows, int64_t, rows)
PORTALM_ARGUMENT(fixed, int64_t, columns)
PORTALM_ARGUMENT(fixed, int64_t, x_stride)
PORTALM_ARGUMENT(fixed, int64_t, residual_stride)
PORTALM_ARGUMENT(fixed, float, eps)
PORTALM_END

// out = silu(gate) * up (silu_mul.h)
PORTALM_KERNEL(silu_mul, SiluMulArgs)
PORTALM_ARGUMENT(input, const void*, gate_up)  // [T, 2 I]
PORTALM_ARGUMENT(output, void*, out)           // [T, I]
PORTALM_ARGUMENT(fixed, DType, dtype)
PORTALM_ARGUMENT(rows, int64_t, rows)
PORTALM_ARGUMENT(fixed, int64_t, columns)  // I
PORTALM_ARGUMENT(fixed, int64_t, stride)   // of gate_up
PORTALM_END

// mixture of experts (moe.h)
PORTALM_KERNEL(moe, MoeArgs)
PORTALM_ARGUMENT(none, const void*, x)  // [T, C]
PORTALM_ARGUMENT(none, DType, dtype)
PORTALM_ARGUMENT(none, int64_t, tokens)
PORTALM_ARGUMENT(none, int64_t, x_stride)
PORTALM_ARGUMENT(none, const int32_t*, ids)      // [T, k]
PORTALM_ARGUMENT(none, const float*, shares)     // [T, k]: routing weights
PORTALM_ARGUMENT(none, int64_t, top_k)           // k
PORTALM_ARGUMENT(none, const int64_t*, experts)  // [E, 4]: address, format of gate_up, then of down
PORTALM_ARGUMENT(none, int64_t, num_experts)     // E
PORTALM_ARGUMENT(none, int64_t, hidden)          // C
PORTALM_ARGUMENT(none, int64_t, inner)           // I
PORTALM_ARGUMENT(none, const void*, gate_up_bias)  // [E, 2 I] in dtype, or null
PORTALM_ARGUMENT(none, const void*, down_bias)     // [E, C] in dtype, or null
PORTALM_ARGUMENT(none, float, limit)               // gpt-oss's clamp; 0: plain silu(gate) * up
PORTALM_ARGUMENT(none, float, alpha)               // gpt-oss's slope; used only with a limit
PORTALM_ARGUMENT(none, void*, out)                 // [T, C], contiguous
PORTALM_END

// rows of a matrix by index (take_rows.h)
PORTALM_KERNEL(take_rows, TakeRowsArgs)
PORTALM_ARGUMENT(table, const void*, x)        // [T, C]
PORTALM_ARGUMENT(input, const int32_t*, rows)  // [R]
PORTALM_ARGUMENT(output, void*, out)           // [R, C]
PORTALM_ARGUMENT(rows, int64_t, num_rows)
PORTALM_ARGUMENT(source_rows, int64_t, num_source_rows)
PORTALM_ARGUMENT(fixed, int64_t, row_bytes)
PORTALM_ARGUMENT(fixed, int64_t, stride_bytes)
PORTALM_END

// rotary embedding of queries and keys (rope.h)
PORTALM_KERNEL(rope, RopeArgs)
PORTALM_ARGUMENT(input, const void*, query)         // [T, H, D]
PORTALM_ARGUMENT(input, const void*, key)           // [T, H_kv, D]
PORTALM_ARGUMENT(output, void*, query_out)          // [T, H, D], contiguous
PORTALM_ARGUMENT(output, void*, key_out)            // [T, H_kv, D], contiguous
PORTALM_ARGUMENT(input, const int32_t*, positions)  // [T]
PORTALM_ARGUMENT(fixed, const float*, cos_sin)      // [max_position, rotary_dim]: cosines, sines
PORTALM_ARGUMENT(fixed, DType, dtype)
PORTALM_ARGUMENT(rows, int64_t, tokens)
PORTALM_ARGUMENT(fixed, int64_t, heads)
PORTALM_ARGUMENT(fixed, int64_t, kv_heads)
PORTALM_ARGUMENT(fixed, int64_t, head_size)
PORTALM_ARGUMENT(fixed, int64_t, rotary_dim)
PORTALM_ARGUMENT(fixed, int64_t, query_stride)
PORTALM_ARGUMENT(fixed, int64_t, key_stride)
PORTALM_ARGUMENT(fixed, bool, is_interleaved)
PORTALM_END

// store a step's keys and values (kv_cache.h)
PORTALM_KERNEL(kv_write, KVWriteArgs)
PORTALM_ARGUMENT(fixed, void*, cache)  // one layer
PORTALM_KV_SHAPE(fixed, shape)
PORTALM_ARGUMENT(input, const void*, key)    // [T, H_kv, D]
PORTALM_ARGUMENT(input, const void*, value)  // [T, H_kv, D]
PORTALM_ARGUMENT(fixed, DType, dtype)        // of key and value
PORTALM_ARGUMENT(rows, int64_t, tokens)
PORTALM_ARGUMENT(fixed, int64_t, key_stride)
PORTALM_ARGUMENT(fixed, int64_t, value_stride)
PORTALM_ARGUMENT(input, const int32_t*, slots)  // [T]
PORTALM_END

// copy blocks within the cache (kv_cache.h)
PORTALM_KERNEL(kv_copy, KVCopyArgs)
PORTALM_ARGUMENT(none, char*, cache)  // all layers
PORTALM_ARGUMENT(none, int64_t, num_layers)
PORTALM_ARGUMENT(none, int64_t, layer_bytes)
PORTALM_ARGUMENT(none, int64_t, block_bytes)
PORTALM_ARGUMENT(none, int64_t, num_copies)          // N
PORTALM_ARGUMENT(none, const int32_t*, source)       // [N]
PORTALM_ARGUMENT(none, const int32_t*, destination)  // [N]
PORTALM_END

// copy blocks out of the cache or into it (kv_cache.h)
PORTALM_KERNEL(kv_wire, KVWireArgs)
PORTALM_ARGUMENT(none, char*, cache)  // all layers
PORTALM_KV_SHAPE(none, shape)
PORTALM_ARGUMENT(none, int64_t, num_layers)
PORTALM_ARGUMENT(none, int64_t, layer_bytes)
PORTALM_ARGUMENT(none, int64_t, num_wire_blocks)  // N
PORTALM_ARGUMENT(none, const int32_t*, blocks)    // [N]
PORTALM_ARGUMENT(none, void*, wire)  // [N, L, 2, B, H_kv, D]; [N, L, 1, ...] with shared values
PORTALM_ARGUMENT(none, bool, is_export)
PORTALM_END

// causal attention over the paged cache (attention.h)
PORTALM_KERNEL(attention, AttentionArgs)
PORTALM_ARGUMENT(input, const void*, query)  // [T, H, D]
PORTALM_ARGUMENT(output, void*, out)         // [T, H, value_size], contiguous
PORTALM_ARGUMENT(fixed, DType, dtype)
PORTALM_ARGUMENT(fixed, int64_t, query_stride)
PORTALM_ARGUMENT(fixed, int64_t, heads)
PORTALM_ARGUMENT(fixed, int64_t, value_size)  // D, or less where values are keys
PORTALM_ARGUMENT(fixed, const void*, cache)   // one layer
PORTALM_KV_SHAPE(fixed, shape)
PORTALM_ARGUMENT(input, const int32_t*, block_table)  // [S, max_blocks]
PORTALM_ARGUMENT(max_blocks, int64_t, max_blocks)
PORTALM_ARGUMENT(plan, const int32_t*,
                 items)  // [num_items, kItemFields] (backends/cpu/attention.py)
PORTALM_ARGUMENT(plan, int64_t, num_items)
PORTALM_ARGUMENT(plan, float*, partials)    // partial results of split items
PORTALM_ARGUMENT(plan, int32_t*, counters)  // [split tiles, H_kv], zero before and after
PORTALM_ARGUMENT(fixed, float, scale)
PORTALM_ARGUMENT(fixed, float, soft_cap)       // 0: none
PORTALM_ARGUMENT(fixed, int64_t, window)       // 0: none
PORTALM_ARGUMENT(fixed, const float*, slopes)  // [H], ALiBi; null: none
PORTALM_ARGUMENT(fixed, const float*, sinks)   // [H]; null: none
PORTALM_END

// sample one token from each row of logits (sample.h)
PORTALM_KERNEL(sample, SampleArgs)
PORTALM_ARGUMENT(none, const float*, logits)  // [R, V]
PORTALM_ARGUMENT(none, int64_t, rows)
PORTALM_ARGUMENT(none, int64_t, vocab)
PORTALM_ARGUMENT(none, int64_t, stride)
PORTALM_ARGUMENT(none, const float*, temperature)  // [R]
PORTALM_ARGUMENT(none, const int32_t*, top_k)      // [R]
PORTALM_ARGUMENT(none, const float*, top_p)        // [R]
PORTALM_ARGUMENT(none, const float*, min_p)        // [R]
PORTALM_ARGUMENT(none, const int64_t*, seed)       // [R]
PORTALM_ARGUMENT(none, const int64_t*, position)   // [R]
PORTALM_ARGUMENT(none, int32_t*, out)              // [R]
PORTALM_END

#undef PORTALM_KERNEL
#undef PORTALM_ARGUMENT
#undef PORTALM_KV_SHAPE
#undef PORTALM_END
