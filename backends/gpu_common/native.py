"""Launchers of the native kernels (csrc_cuda, csrc_rocm).

The wheel contains them if a compiler was found when it was built; otherwise Triton kernels do all
the work. There is one: attention of decodes of few requests, which merges split contexts in one
launch. With more requests, Triton's kernel is faster because it uses tensor cores (docs/adr/0024).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import AttentionSpec

DTYPES = {torch.float16: 0, torch.bfloat16: 1}
"""The kernels' numbers of dtypes (csrc_cuda/arguments.h)."""

MOST_REQUESTS = 8
"""Most requests in a step that decodes natively: the kernel computes on scalar units, so it pays
only where launches and the latency of one context decide. csrc_cuda/README.md says how to measure
the limit."""

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
    def decodes(kv: torch.Tensor, query: torch.Tensor) -> bool:
        """True if `decode_attention` supports query [S, H, D] and cache [L, NB, H_kv, 2, B, D]."""
        is_plain = kv.dtype == query.dtype and query.dtype in DTYPES
        return is_plain and kv.shape[4] % ITEM_ALIGNMENT == 0

    # -- operations ---------------------------------------------------------------------------

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
