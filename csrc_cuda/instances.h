// Which kernels are built: the one list, for every device. It is included with these defined:
//
//   PORTALM_KERNEL(name, Args, threads, ...)   `...`: the device function
//   PORTALM_WRITE(T)                           dtype of all that it reads and writes
//   PORTALM_DECODE(T, D)                       and head size
#ifndef PORTALM_WRITE
#define PORTALM_WRITE(T) PORTALM_KERNEL(kv_write_##T, KvWriteArgs, kWriteThreads, kv_write<T>)
#endif
#ifndef PORTALM_DECODE
#define PORTALM_DECODE(T, D)                                                      \
  PORTALM_KERNEL(decode_attention_##T##_##D, DecodeAttentionArgs, kDecodeThreads, \
                 decode_attention<T, D>)
#endif

PORTALM_KERNEL(kv_copy, KvCopyArgs, kCopyThreads, kv_copy)
PORTALM_KERNEL(sample, SampleArgs, kSampleThreads, sample)
PORTALM_WRITE(BFloat16)
PORTALM_WRITE(Half)
PORTALM_DECODE(BFloat16, 128)
PORTALM_DECODE(BFloat16, 64)
#if !defined(PORTALM_FEW_KERNELS)  // tests that have no time to compile the rest
PORTALM_DECODE(Half, 64)
PORTALM_DECODE(Half, 128)
#endif

#undef PORTALM_KERNEL
#undef PORTALM_WRITE
#undef PORTALM_DECODE
