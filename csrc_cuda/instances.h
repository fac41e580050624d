// Which kernels are built: the one list, for every device. It is included with these defined:
//
//   PORTALM_KERNEL(name, Args, threads, ...)   `...`: the device function
//   PORTALM_WRITE(T, C)                        dtypes: of queries and keys, of the cache
//   PORTALM_DECODE(T, C, D)                    and head size
#ifndef PORTALM_WRITE
#define PORTALM_WRITE(T, C) \
  PORTALM_KERNEL(kv_write_##T##_##C, KvWriteArgs, kWriteThreads, kv_write<T, C>)
#endif
#ifndef PORTALM_DECODE
#define PORTALM_DECODE(T, C, D)                                                        \
  PORTALM_KERNEL(decode_attention_##T##_##C##_##D, DecodeAttentionArgs, kDecodeThreads, \
                 decode_attention<T, C, D>)
#endif

PORTALM_KERNEL(kv_copy, KvCopyArgs, kCopyThreads, kv_copy)
PORTALM_KERNEL(sample, SampleArgs, kSampleThreads, sample)
PORTALM_WRITE(BFloat16, BFloat16)
PORTALM_WRITE(BFloat16, Fp8)
PORTALM_WRITE(Half, Half)
PORTALM_DECODE(BFloat16, BFloat16, 128)
PORTALM_DECODE(BFloat16, Fp8, 64)
#if !defined(PORTALM_FEW_KERNELS)  // tests that have no time to compile the rest
PORTALM_DECODE(BFloat16, BFloat16, 64)
PORTALM_DECODE(BFloat16, Fp8, 128)
PORTALM_DECODE(Half, Half, 64)
PORTALM_DECODE(Half, Half, 128)
#endif

#undef PORTALM_KERNEL
#undef PORTALM_WRITE
#undef PORTALM_DECODE
