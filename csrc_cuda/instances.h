// The list of kernels to build, for every device. A file that includes it defines some of
//
//   PORTALM_KERNEL(name, Args, threads, ...)   `...`: the device function
//   PORTALM_DECODE(T, D)                       decode_attention; T: dtype, D: head size
#ifndef PORTALM_DECODE
#define PORTALM_DECODE(T, D)                                                      \
  PORTALM_KERNEL(decode_attention_##T##_##D, DecodeAttentionArgs, kDecodeThreads, \
                 decode_attention<T, D>)
#endif

PORTALM_DECODE(BFloat16, 128)
PORTALM_DECODE(BFloat16, 64)
#if !defined(PORTALM_FEW_KERNELS)  // tests that compile only these, to save time
PORTALM_DECODE(Half, 64)
PORTALM_DECODE(Half, 128)
#endif

#undef PORTALM_KERNEL
#undef PORTALM_DECODE
