// The list of kernels to build, for every device. A file that includes it defines some of
//
//   PORTALM_KERNEL(name, Args, threads, ...)   `...`: the device function
//   PORTALM_WRITE(T)                           kv_write; T: dtype of its tensors
//   PORTALM_DECODE(T, D)                       decode_attention; D: head size
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
#if !defined(PORTALM_FEW_KERNELS)  // tests that compile only these, to save time
PORTALM_DECODE(Half, 64)
PORTALM_DECODE(Half, 128)
#endif

#undef PORTALM_KERNEL
#undef PORTALM_WRITE
#undef PORTALM_DECODE
