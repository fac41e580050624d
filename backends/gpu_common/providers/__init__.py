"""Optional packages that compute attention of long prompts; none is required.

A package is used for a kind of layer if its results match those of the own kernels on random data
in the model's shape, and if it is faster (check.py). flash_attention.py and flashinfer.py adapt one
package each: they read the cache where it is, through strides, without a copy.
"""

from portalm_backends.gpu_common.providers.flash_attention import FlashAttention3
from portalm_backends.gpu_common.providers.flashinfer import FlashInfer
from portalm_backends.gpu_common.providers.provider import AttentionProvider

ATTENTION: tuple[AttentionProvider, ...] = (FlashAttention3(), FlashInfer())
"""Providers of attention, the preferred ones first."""
