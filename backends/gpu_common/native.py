"""The native kernels (csrc_cuda, csrc_rocm): which operations they do, and how they are called.

They are built into the wheel where a compiler for them was found; without them Triton does it all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import AttentionSpec, KVSpec, SampleOutput, SampleParams
from portalm_backends.portable import sampling

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
"""How the kernels name a dtype (csrc_cuda/arguments.h)."""

DECODE_HEAD_SIZES = frozenset({64, 128})
DECODE_GROUP_SIZE = 4
"""Most query heads of a KV head: with more, products without tensor cores outlast the reads."""

ITEM_ALIGNMENT = 16
"""Tokens: where a stretch of a context may begin (csrc_cuda/decode_attention.cuh)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Who does an operation, and why."""

    is_native: bool
    because: str


CHOICES = {
    "kv_copy": Choice(
        True, "one launch copies all layers, between steps, where the host's cost shows"
    ),
    "sample": Choice(
        True, "the threshold search is histograms in shared memory, which Triton lacks"
    ),
    "kv_write": Choice(
        False,
        "one launch in either, captured in most steps; Triton's takes float32 too. The native one "
        "spares eager steps Triton's launcher: until a GPU has measured how much, one is enough",
    ),
    "decode_attention": Choice(
        False,
        "Triton's has tensor cores and takes every step. The native one splits and merges long "
        "contexts in one launch, for small groups of heads: until a GPU has measured both, "
        "a request's tokens all come from the same kernel",
    ),
    "linear": Choice(False, "the vendor's library through torch, and Triton for few bits"),
    "norms": Choice(False, "one pass over rows, which Triton does at the speed of memory"),
}
"""What the GPU backends take, where there are both or others would ask."""


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


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How a step's contexts are split over thread blocks (csrc_cuda/arguments.h, DecodeItem)."""

    items: npt.NDArray[np.int32]
    """[N, 5]: request; first token; end; its request's first item; how many it has, 0: padding."""
    has_splits: bool
    """Some request has several items."""


def plan_decodes(
    seq_lens: npt.NDArray[np.integer[Any]],
    *,
    max_items: int,
    window: int | None = None,
    min_tokens: int = 256,
) -> DecodePlan:
    """Stretches of about the same length, as many as `max_items` allow; the rest is padding.

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
    items = np.zeros((max_items, 5), np.int32)
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
    return DecodePlan(items=items, has_splits=bool((counts > 1).any()))


class NativeKernels:
    """The launchers, called with tensors. Nothing here waits for the device."""

    def __init__(self, module: Any, stream: Callable[[], int]) -> None:
        """`module`: portalm_backends._cuda or ._rocm; `stream` gives the one that torch uses."""
        self._module = module
        self._stream = stream

    # -- what they take: asked when an engine starts -------------------------------------------

    @staticmethod
    def writes(dtype: torch.dtype, kv: KVSpec, rotary_dim: int, *, is_interleaved: bool) -> bool:
        """Whether `kv_write` takes this cache and this rotation."""
        rotated = rotary_dim if is_interleaved else rotary_dim // 2
        return _takes(dtype, kv) and kv.head_size % 8 == 0 and rotated % 8 == 0

    @staticmethod
    def decodes(dtype: torch.dtype, kv: KVSpec, spec: AttentionSpec) -> bool:
        """Whether `decode_attention` takes this layer."""
        return (
            _takes(dtype, kv)
            and spec.head_size in DECODE_HEAD_SIZES
            and spec.num_heads // spec.num_kv_heads <= DECODE_GROUP_SIZE
            and kv.block_size % ITEM_ALIGNMENT == 0
        )

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


def _takes(dtype: torch.dtype, kv: KVSpec) -> bool:
    """Whether kernels were built for these dtypes (csrc_cuda/instances.h)."""
    name = str(dtype).removeprefix("torch.")
    return (name, kv.dtype) in {
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float8_e4m3fn"),
        ("float16", "float16"),
    }


def _layer(x: torch.Tensor, cache: torch.Tensor) -> tuple[int, ...]:
    """A layer's cache [NB, H_kv, 2, B, D] as the launchers take it, after the dtype of `x`."""
    ptr = cache.data_ptr()
    block, head, half, token, _ = cache.stride()
    return (
        DTYPES[x.dtype], DTYPES[cache.dtype], ptr, ptr + half * cache.element_size(),
        block, token, head, cache.shape[3],
    )  # fmt: skip


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
