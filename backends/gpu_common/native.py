"""The native kernels (csrc_cuda, csrc_rocm) and how they are called.

They are built into the wheel where a compiler for them was found; without them Triton does it all.
Where they are there they do what has one launch more in Triton, or costs the host more:

- blocks are copied in all layers at once, between steps, where nothing hides the host's cost
- keys are rotated and written: a step that is not captured is spared Triton's launcher
- decodes too few to fill the device: a context that is split is merged in the same launch; with
  more requests Triton's tensor cores are the better road
- tokens are drawn: the search of a threshold by histograms in shared memory, which Triton lacks
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
"""How the kernels name a dtype (csrc_cuda/arguments.h)."""

DECODE_HEAD_SIZES = frozenset({64, 128})
DECODE_GROUP_SIZE = 4
"""Most query heads of a KV head: with more, products without tensor cores outlast the reads."""

ITEM_FIELDS = 5
"""Request; first token; end; its request's first item; how many it has, 0: padding
(csrc_cuda/arguments.h, DecodeItem)."""

ITEM_ALIGNMENT = 16
"""Tokens: where a stretch of a context may begin (csrc_cuda/decode_attention.cuh)."""


def missing(vendor: str, arch: str) -> str | None:
    """What keeps the native kernels from running on this architecture; None: nothing.

    Args:
        vendor: "cuda" or "rocm".
        arch: as the vendor's compiler names it: "sm_90", "gfx942".
    """
    try:
        module = importlib.import_module(f"portalm_backends._{vendor}")
    except ImportError:
        tool = "nvcc" if vendor == "cuda" else "a clang with amdgcn, and lld"
        return f"they were not built: no {tool} was found when PortaLM was installed"
    if vendor == "rocm" and not _code_object(module, arch).exists():
        return f"they were not built for {arch}"
    return None


def load(vendor: str, arch: str) -> NativeKernels:
    """The kernels, ready to be launched; call where `missing` finds nothing."""
    module = importlib.import_module(f"portalm_backends._{vendor}")
    if vendor == "rocm":
        module.load(str(_code_object(module, arch)))
    return NativeKernels(module, lambda: torch.cuda.current_stream().cuda_stream)


def _code_object(module: Any, arch: str) -> Path:
    """The file for one architecture, beside the module. Names may have features: gfx942:xnack-."""
    return Path(module.__file__).parent / "_rocm_kernels" / f"{arch.split(':')[0]}.hsaco"


def has_decodes(spec: AttentionSpec) -> bool:
    """Whether there is a decode attention for layers of this kind."""
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
    """[max_items, ITEM_FIELDS]: stretches of contexts, of about the same length; then padding.

    Args:
        seq_lens: context length of each request, 0 for pad requests.
        max_items: rows of the result; at least as many as there are requests.
        window: tokens that a query sees, itself included; None: all.
        min_tokens: a stretch shorter than this is not worth its merge.
    """
    first = np.maximum(seq_lens - window, 0) if window else np.zeros_like(seq_lens)
    first = first // ITEM_ALIGNMENT * ITEM_ALIGNMENT
    lengths = np.maximum(seq_lens - first, 0)
    spare = max_items - np.count_nonzero(lengths)
    # with stretches of this length there are at most `spare` more than one for each request
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
    """The launchers, called with tensors. Nothing here waits for the device."""

    def __init__(self, module: Any, stream: Callable[[], int]) -> None:
        """`module`: portalm_backends._cuda or ._rocm; `stream` gives the one that torch uses."""
        self._module = module
        self._stream = stream

    # -- what they take -----------------------------------------------------------------------

    @staticmethod
    def writes(kv: torch.Tensor, key: torch.Tensor, num_rotated: int = 0) -> bool:
        """Whether `kv_write` takes keys [T, H_kv, D] and values into this cache.

        `num_rotated`: dimensions that lie side by side and are rotated alike, half of those that
        are rotated, all where pairs are neighbours.
        """
        size, has_values = key.shape[2], kv.shape[3] == 2
        is_plain = kv.dtype == key.dtype and key.dtype in DTYPES
        return has_values and is_plain and not (size % 8 or num_rotated % 8)

    @staticmethod
    def decodes(kv: torch.Tensor, query: torch.Tensor) -> bool:
        """Whether `decode_attention` takes [S, H, D] over a cache [L, NB, H_kv, 2, B, D]."""
        is_plain = kv.dtype == query.dtype and query.dtype in DTYPES
        return is_plain and kv.shape[4] % ITEM_ALIGNMENT == 0

    # -- operations ---------------------------------------------------------------------------

    def kv_copy(self, cache: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copy blocks src[i] to dst[i], int32 [N], in every layer of cache [L, NB, ...]."""
        layers = cache.shape[0]
        block_bytes = cache[0, 0].numel() * cache.element_size()
        self._module.kv_copy(
            self._stream(), cache.data_ptr(), layers, cache.stride(0) * cache.element_size(),
            block_bytes, src.numel(), src.data_ptr(), dst.data_ptr(),
        )  # fmt: skip

    def kv_write(
        self, cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Put key and value [T, H_kv, D] into slots int32 [T] of a layer [NB, H_kv, 2, B, D]."""
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
        """`Backend.rope` and `Backend.kv_write` at once; the rotated query [T, H, D]."""
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
            cache: one layer, [NB, H_kv, 2, B, D]; it already holds this step.
            query: [S, H, D], row i of request i.
            block_table: int32 [S, MB]
            seq_lens: int32 [S], 0 for pad requests, whose rows are left as they are.
            items: int32 [N, 5], `plan_decodes` of these lengths.
            workspace: of `decode_workspace`, for this many items and requests at least.
            spec: of the layer.
            slopes: float32 [H], where `spec` has slopes.
            sinks: float32 [H], where `spec` has sinks.

        Returns:
            [S, H, D] in the dtype of `query`.
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
        """Memory for unfinished sums, and counters that are 0 between launches; layers share it."""
        sums = max_items * spec.num_heads * (spec.head_size + 2)
        return (
            torch.empty(sums, dtype=torch.float32, device=device),
            torch.zeros(max_requests * spec.num_kv_heads, dtype=torch.int32, device=device),
        )

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """Draw one token from each row of float32 logits [R, V], as `SampleParams` says."""
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
    """A layer's cache [NB, H_kv, 2, B, D] as the launchers take it, after the dtype of `x`."""
    ptr = cache.data_ptr()
    block, head, half, token, _ = cache.stride()
    return (
        DTYPES[x.dtype], ptr, ptr + half * cache.element_size(), block, token, head,
        cache.shape[3],
    )  # fmt: skip


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
