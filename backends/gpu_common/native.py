"""Launchers of the native kernels (csrc_cuda, csrc_rocm).

The wheel contains them if a compiler was found when it was built; otherwise Triton kernels do all
the work. They are used where Triton needs another launch or costs the host more time:

- block copies of all layers at once: they run between steps, where nothing hides the host's time
- rotating and writing keys: in steps that are not captured, this avoids Triton's launch overhead
- decodes of too few requests to fill the device: split contexts are merged in the same launch. With
  more requests, Triton's kernel is faster because it uses tensor cores
- sampling: thresholds are searched with histograms in shared memory, which Triton does not have
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import AttentionSpec, SampleOutput, SampleParams
from portalm_backends.portable import sampling

DTYPES = {torch.float16: 0, torch.bfloat16: 1}
"""The kernels' numbers of dtypes (csrc_cuda/arguments.h)."""

DECODE_HEAD_SIZES = frozenset({64, 128})
DECODE_GROUP_SIZE = 4
"""Most query heads per KV head: with more, computing without tensor cores takes longer than
reading the cache."""

ITEM_FIELDS = 5
"""Request; first token; end; first item of the request; number of its items, 0: padding
(csrc_cuda/arguments.h, DecodeItem)."""

ITEM_ALIGNMENT = 16
"""Items start at multiples of this many tokens (csrc_cuda/decode_attention.cuh)."""


def missing(vendor: str, arch: str) -> str | None:
    """Reason why the native kernels cannot run on this architecture; None if they can.

    Args:
        vendor: "cuda" or "rocm".
        arch: compiler name of the architecture: "sm_90", "gfx942".
    """
    try:
        module = importlib.import_module(f"portalm_backends._{vendor}")
    except ImportError:
        tool = "nvcc" if vendor == "cuda" else "a clang with amdgcn, and lld"
        return f"they were not built, because {tool} was not found when PortaLM was installed"
    if vendor == "rocm" and not _code_object(module, arch).exists():
        return f"they were not built for {arch}"
    return None


def load(vendor: str, arch: str) -> NativeKernels:
    """Load the kernels; call only if `missing` returns None."""
    module = importlib.import_module(f"portalm_backends._{vendor}")
    if vendor == "rocm":
        module.load(str(_code_object(module, arch)))
    return NativeKernels(module, lambda: torch.cuda.current_stream().cuda_stream)


def _code_object(module: Any, arch: str) -> Path:
    """The kernels' file for an architecture, whose name may have features: gfx942:xnack-."""
    return Path(module.__file__).parent / "_rocm_kernels" / f"{arch.split(':')[0]}.hsaco"


def has_decodes(spec: AttentionSpec) -> bool:
    """True if the native decode attention supports layers of this kind."""
    group = spec.num_heads // spec.num_kv_heads
    has_own_values = spec.value_size is None
    return has_own_values and spec.head_size in DECODE_HEAD_SIZES and group <= DECODE_GROUP_SIZE


def plan_decodes(
    seq_lens: npt.NDArray[np.integer[Any]],
    *,
    max_items: int,
    window: int | None = None,
    min_tokens: int = 256,
) -> npt.NDArray[np.int32]:
    """Split contexts into items of about equal length: [max_items, ITEM_FIELDS], then padding.

    Args:
        seq_lens: context length of each request, 0 for padding requests.
        max_items: rows of the result; at least the number of requests.
        window: window size including the query token itself; None: unlimited.
        min_tokens: least length of an item; merging shorter ones costs more than it saves.
    """
    first = np.maximum(seq_lens - window, 0) if window else np.zeros_like(seq_lens)
    first = first // ITEM_ALIGNMENT * ITEM_ALIGNMENT
    lengths = np.maximum(seq_lens - first, 0)
    spare = max_items - np.count_nonzero(lengths)
    # with items of this length, splitting adds at most `spare` items to one per request
    length = max(int(-(-lengths.sum() // max(spare, 1))), min_tokens)
    length = -(-length // ITEM_ALIGNMENT) * ITEM_ALIGNMENT
    counts = -(-lengths // length)

    request = np.repeat(np.arange(len(seq_lens)), counts)
    first_item = np.repeat(np.cumsum(counts) - counts, counts)
    begin = first[request] + (np.arange(len(request)) - first_item) * length
    items = np.zeros((max_items, ITEM_FIELDS), np.int32)
    items[: len(request)] = np.stack(
        (
            request,
            begin,
            np.minimum(begin + length, seq_lens[request]),
            first_item,
            counts[request],
        ),
        axis=1,
    )
    return items


class NativeKernels:
    """Launches the native kernels on tensors. No method waits for the device."""

    def __init__(self, module: Any, stream: Callable[[], int]) -> None:
        """Use `module`, portalm_backends._cuda or ._rocm, and the stream that `stream` returns."""
        self._module = module
        self._stream = stream

    # -- supported arguments ------------------------------------------------------------------

    @staticmethod
    def writes(kv: torch.Tensor, key: torch.Tensor, num_rotated: int = 0) -> bool:
        """True if `kv_write` can write keys [T, H_kv, D] and values to this cache.

        Args:
            kv: [L, NB, H_kv, 2, B, D]
            key: [T, H_kv, D]
            num_rotated: contiguous dimensions that a vector of the rotation may span: rotary_dim
                if pairs are adjacent, else half of it; 0: no rotation.
        """
        size, has_values = key.shape[2], kv.shape[3] == 2
        is_plain = kv.dtype == key.dtype and key.dtype in DTYPES
        return has_values and is_plain and not (size % 8 or num_rotated % 8)

    @staticmethod
    def decodes(kv: torch.Tensor, query: torch.Tensor) -> bool:
        """True if `decode_attention` supports query [S, H, D] and cache [L, NB, H_kv, 2, B, D]."""
        is_plain = kv.dtype == query.dtype and query.dtype in DTYPES
        return is_plain and kv.shape[4] % ITEM_ALIGNMENT == 0

    # -- operations ---------------------------------------------------------------------------

    def kv_copy(self, cache: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copy blocks src[i] to dst[i], int32 [N] each, in every layer of cache [L, NB, ...]."""
        layers = cache.shape[0]
        block_bytes = cache[0, 0].numel() * cache.element_size()
        self._module.kv_copy(
            self._stream(), cache.data_ptr(), layers, cache.stride(0) * cache.element_size(),
            block_bytes, src.numel(), src.data_ptr(), dst.data_ptr(),
        )  # fmt: skip

    def kv_write(
        self, cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Write key and value [T, H_kv, D] to slots int32 [T] of a layer [NB, H_kv, 2, B, D]."""
        self._module.kv_write(
            self._stream(), *_layer(key, cache), key.data_ptr(), key.stride(0), value.data_ptr(),
            value.stride(0), slots.data_ptr(), *key.shape, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip

    def rope_kv_write(
        self,
        cache: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        is_interleaved: bool,
    ) -> torch.Tensor:
        """Apply `Backend.rope` and `Backend.kv_write`; return the rotated query [T, H, D]."""
        rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._module.kv_write(
            self._stream(), *_layer(key, cache), key.data_ptr(), key.stride(0), value.data_ptr(),
            value.stride(0), slots.data_ptr(), *key.shape, query.data_ptr(), query.stride(0),
            rotated.data_ptr(), query.shape[1], positions.data_ptr(), cos_sin.data_ptr(),
            cos_sin.shape[1], int(is_interleaved),
        )  # fmt: skip
        return rotated

    def decode_attention(
        self,
        cache: torch.Tensor,
        query: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        items: torch.Tensor,
        workspace: tuple[torch.Tensor, torch.Tensor],
        spec: AttentionSpec,
        slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one query token of each request over its context.

        Args:
            cache: one layer, [NB, H_kv, 2, B, D]; it already holds this step's tokens.
            query: [S, H, D], row i belongs to request i.
            block_table: int32 [S, MB]
            seq_lens: int32 [S], 0 for padding requests.
            items: int32 [N, 5], the result of `plan_decodes` for these lengths.
            workspace: from `decode_workspace`, for at least this many items and requests.
            spec: attention parameters of the layer.
            slopes: float32 [H] if `spec` has ALiBi slopes.
            sinks: float32 [H] if `spec` has sinks.

        Returns:
            [S, H, D] in the dtype of `query`; rows of padding requests are not written.
        """
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        partials, counters = workspace
        self._module.decode_attention(
            self._stream(), *_layer(query, cache), query.data_ptr(), query.stride(0),
            out.data_ptr(), block_table.data_ptr(), block_table.stride(0), seq_lens.data_ptr(),
            items.data_ptr(), items.shape[0], partials.data_ptr(), counters.data_ptr(),
            spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_size, spec.scale,
            spec.soft_cap or 0.0, spec.sliding_window or 0, _address(slopes), _address(sinks),
        )  # fmt: skip
        return out

    @staticmethod
    def decode_workspace(
        spec: AttentionSpec, max_items: int, max_requests: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate partial sums, and counters that are 0 between launches; layers share both."""
        sums = max_items * spec.num_heads * (spec.head_size + 2)
        return (
            torch.empty(sums, dtype=torch.float32, device=device),
            torch.zeros(max_requests * spec.num_kv_heads, dtype=torch.int32, device=device),
        )

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """Sample one token from each row of float32 logits [R, V] by `params`."""
        scores = sampling.adjust(logits, params)
        if scores.stride(1) != 1:
            scores = scores.contiguous()
        token_ids = torch.empty(len(scores), dtype=torch.int32, device=scores.device)
        self._module.sample(
            self._stream(), scores.data_ptr(), *scores.shape, scores.stride(0),
            params.temperature.data_ptr(), params.top_k.data_ptr(), params.top_p.data_ptr(),
            params.min_p.data_ptr(), params.seed.data_ptr(), params.position.data_ptr(),
            token_ids.data_ptr(),
        )  # fmt: skip
        return sampling.finish(token_ids, logits, params)


def _layer(x: torch.Tensor, cache: torch.Tensor) -> tuple[int, ...]:
    """Launcher arguments for the dtype of `x` and a layer's cache [NB, H_kv, 2, B, D]."""
    ptr = cache.data_ptr()
    block, head, half, token, _ = cache.stride()
    return (
        DTYPES[x.dtype], ptr, ptr + half * cache.element_size(), block, token, head,
        cache.shape[3],
    )  # fmt: skip


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
