"""The backend under test, with helpers that all checks use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import KV, Backend, Bucket, KVSpec
from portalm.conformance.base import CheckFailed, NotClaimed
from portalm.conformance.numerics import FloatArray, torch_dtype
from portalm.errors import Unsupported

MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS = 1024, 16, 32
"""Size of the largest step that a check runs, passed to `Backend.buckets`."""


class Subject:
    """A backend, its claims, and transfers of tensors."""

    def __init__(self, backend: Backend) -> None:
        """Wrap a started backend."""
        self.backend = backend
        self.claims = backend.capabilities
        buckets = backend.buckets(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS)
        self.buckets: list[Bucket] | None = None if buckets is None else sorted(buckets)

    # -- claims -------------------------------------------------------------------------------

    @property
    def head_size(self) -> int:
        """Head size for checks that do not vary it: 64 if claimed."""
        return _preferred(self.claims.head_sizes, 64)

    @property
    def block_size(self) -> int:
        """Block size for checks that do not vary it: 16 if claimed."""
        return _preferred(self.claims.block_sizes, 16)

    @property
    def dtype(self) -> str:
        """Dtype for checks that do not vary it: the most precise one claimed."""
        return self.some_dtype(self.claims.dtypes)

    def kv_dtype(self, dtype: str) -> str:
        """Return the KV dtype to use with `dtype`: the same if claimed."""
        return dtype if dtype in self.claims.kv_dtypes else self.some_dtype(self.claims.kv_dtypes)

    @staticmethod
    def some_dtype(claimed: frozenset[str]) -> str:
        """Return the most precise of `claimed`."""
        return next((d for d in ("float32", "float16", "bfloat16") if d in claimed), min(claimed))

    def needs_dtype(self, dtype: str) -> None:
        """Raise `NotClaimed` if the backend does not compute in `dtype`."""
        if dtype not in self.claims.dtypes:
            raise NotClaimed(f"dtype {dtype}")

    def needs_kv_dtype(self, dtype: str) -> None:
        """Raise `NotClaimed` if the backend does not store keys and values in `dtype`."""
        if dtype not in self.claims.kv_dtypes:
            raise NotClaimed(f"KV dtype {dtype}")

    def needs_feature(self, feature: str) -> None:
        """Raise `NotClaimed` if the backend does not claim `feature`."""
        if not self.has(feature):
            raise NotClaimed(f"feature {feature}")

    def has(self, feature: str) -> bool:
        """Return whether `feature` is claimed."""
        return feature in self.claims.features

    def must_refuse(self, what: str, action: Callable[[], object]) -> None:
        """Raise `NotClaimed` if `action` raises `Unsupported`, else `CheckFailed`."""
        try:
            action()
        except Unsupported as refusal:
            if not str(refusal).strip():
                raise CheckFailed(f"{what} is refused without a reason") from None
            raise NotClaimed(what) from None
        raise CheckFailed(f"{what} is not claimed in Capabilities, but is not refused")

    # -- tensors ------------------------------------------------------------------------------

    def put(self, x: FloatArray, dtype: str = "float32") -> torch.Tensor:
        """Copy `x` to the device as `dtype`."""
        host = np.array(x, np.float32, order="C")
        return self.backend.to_device(host).to(torch_dtype(dtype))

    def index(self, values: Sequence[int] | npt.NDArray[Any]) -> torch.Tensor:
        """Copy indices to the device as int32."""
        return self.backend.to_device(np.array(values, np.int32, order="C"))

    def get(self, x: torch.Tensor) -> npt.NDArray[Any]:
        """Copy `x` to the host; floats become float32."""
        if x.is_floating_point():
            x = x.to(torch.float32)
        return np.array(self.backend.to_host(x).result())

    # -- KV cache -----------------------------------------------------------------------------

    def nan_cache(self, spec: KVSpec, num_blocks: int) -> KV:
        """Allocate a cache whose slots are all NaN, so that reading an unused slot shows."""
        kv = self.backend.kv_alloc(spec, num_blocks)
        shape = wire_shape(spec, num_blocks)
        wire = torch.full(shape, float("nan")).to(torch_dtype(spec.wire_dtype))
        return self.backend.kv_import(kv, self.index(range(num_blocks)), wire)

    def export(self, kv: KV, blocks: Sequence[int]) -> npt.NDArray[np.float32]:
        """Export blocks as float32 [N, L, P, B, H_kv, D]."""
        wire: npt.NDArray[np.float32] = (
            self.backend.kv_export(kv, self.index(blocks)).to("cpu", torch.float32).numpy()
        )
        return wire


def wire_shape(spec: KVSpec, num_blocks: int) -> tuple[int, ...]:
    """Shape of `num_blocks` exported blocks: [N, L, P, B, H_kv, D]."""
    block = (spec.block_size, spec.num_kv_heads, spec.head_size)
    return num_blocks, spec.num_layers, spec.num_planes, *block


def _preferred(claimed: frozenset[int] | None, wanted: int) -> int:
    """Return `wanted` if claimed, else the smallest claimed value."""
    return wanted if claimed is None or wanted in claimed else min(claimed)
