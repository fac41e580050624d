// Which kernels are built: the one list, for every device. It is included with these defined:
//
//   PORTALM_KERNEL(name, Args, threads, ...)   `...`: the device function
//   PORTALM_WRITE(T, C)                        dtypes: of queries and keys, of the cache
//   PORTALM_DECODE(T, C, D, G)                 head size, query heads of a KV head at most
#ifndef PORTALM_WRITE
#define PORTALM_WRITE(T, C) \
  PORTALM_KERNEL(kv_write_##T##_##C, KvWriteArgs, kWriteThreads, kv_write<T, C>)
#endif
#ifndef PORTALM_DECODE
#define PORTALM_DECODE(T, C, D, G)                                                           \
  PORTALM_KERNEL(decode_attention_##T##_##C##_##D##_##G, DecodeAttentionArgs, kDecodeThreads, \
                 decode_attention<T, C, D, G>)
#endif

PORTALM_KERNEL(kv_copy, KvCopyArgs, kCopyThreads, kv_copy)
PORTALM_KERNEL(sample, SampleArgs, kSampleThreads, sample)
PORTALM_WRITE(BFloat16, BFloat16)
PORTALM_WRITE(BFloat16, Fp8)
PORTALM_WRITE(Half, Half)
PORTALM_DECODE(BFloat16, BFloat16, 128, 4)
PORTALM_DECODE(BFloat16, Fp8, 64, 1)
#if !defined(PORTALM_FEW_KERNELS)  // tests that have no time to compile the rest
PORTALM_DECODE(BFloat16, BFloat16, 64, 1)
PORTALM_DECODE(BFloat16, BFloat16, 64, 4)
PORTALM_DECODE(BFloat16, BFloat16, 128, 1)
PORTALM_DECODE(BFloat16, Fp8, 64, 4)
PORTALM_DECODE(BFloat16, Fp8, 128, 1)
PORTALM_DECODE(BFloat16, Fp8, 128, 4)
PORTALM_DECODE(Half, Half, 64, 1)
PORTALM_DECODE(Half, Half, 64, 4)
PORTALM_DECODE(Half, Half, 128, 1)
PORTALM_DECODE(Half, Half, 128, 4)
#endif

#undef PORTALM_KERNEL
#undef PORTALM_WRITE
#undef PORTALM_DECODE
