"""The backend under test, with what every check asks of it in one line."""

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
"""The largest step that a check runs: what `Backend.buckets` is asked for."""


class Subject:
    """A backend and what it claims, as checks see them."""

    def __init__(self, backend: Backend) -> None:
        """Wrap a started backend."""
        self.backend = backend
        self.claims = backend.capabilities
        buckets = backend.buckets(MAX_TOKENS, MAX_REQUESTS, MAX_BLOCKS)
        self.buckets: list[Bucket] | None = None if buckets is None else sorted(buckets)

    # -- what is claimed ----------------------------------------------------------------------

    @property
    def head_size(self) -> int:
        """The head size of checks that are not about head sizes: 64 where claimed."""
        return _preferred(self.claims.head_sizes, 64)

    @property
    def block_size(self) -> int:
        """The block size of checks that are not about block sizes: 16 where claimed."""
        return _preferred(self.claims.block_sizes, 16)

    @property
    def dtype(self) -> str:
        """The dtype of checks that are not about dtypes: the most precise one claimed."""
        return self.some_dtype(self.claims.dtypes)

    def kv_dtype(self, dtype: str) -> str:
        """The KV dtype that goes with `dtype`: the same where claimed."""
        return dtype if dtype in self.claims.kv_dtypes else self.some_dtype(self.claims.kv_dtypes)

    @staticmethod
    def some_dtype(claimed: frozenset[str]) -> str:
        """The most precise of `claimed`."""
        return next((d for d in ("float32", "float16", "bfloat16") if d in claimed), min(claimed))

    def needs_dtype(self, dtype: str) -> None:
        """`NotClaimed` if the backend does not compute in `dtype`."""
        if dtype not in self.claims.dtypes:
            raise NotClaimed(f"dtype {dtype}")

    def needs_kv_dtype(self, dtype: str) -> None:
        """`NotClaimed` if the backend does not keep keys and values in `dtype`."""
        if dtype not in self.claims.kv_dtypes:
            raise NotClaimed(f"KV dtype {dtype}")

    def needs_feature(self, feature: str) -> None:
        """`NotClaimed` if the backend does not have `feature`."""
        if not self.has(feature):
            raise NotClaimed(f"feature {feature}")

    def has(self, feature: str) -> bool:
        """True if `feature` is claimed."""
        return feature in self.claims.features

    def must_refuse(self, what: str, action: Callable[[], object]) -> None:
        """`NotClaimed` if `action` raises `Unsupported`; it is a failure if it does not."""
        try:
            action()
        except Unsupported as refusal:
            if not str(refusal).strip():
                raise CheckFailed(f"{what} is refused, but without a reason") from None
            raise NotClaimed(what) from None
        raise CheckFailed(f"{what} is not claimed in Capabilities, yet it is not refused")

    # -- tensors ------------------------------------------------------------------------------

    def put(self, x: FloatArray, dtype: str = "float32") -> torch.Tensor:
        """`x` on the device, in `dtype`."""
        host = np.array(x, np.float32, order="C")
        return self.backend.to_device(host).to(torch_dtype(dtype))

    def index(self, values: Sequence[int] | npt.NDArray[Any]) -> torch.Tensor:
        """int32 on the device."""
        return self.backend.to_device(np.array(values, np.int32, order="C"))

    def get(self, x: torch.Tensor) -> npt.NDArray[Any]:
        """`x` on the host: float32 if it is any float, as it is otherwise."""
        if x.is_floating_point():
            x = x.to(torch.float32)
        return np.array(self.backend.to_host(x).result())

    # -- KV cache -----------------------------------------------------------------------------

    def nan_cache(self, spec: KVSpec, num_blocks: int) -> KV:
        """A cache in which every slot is NaN, the null block's too: a dead slot read shows."""
        kv = self.backend.kv_alloc(spec, num_blocks)
        shape = wire_shape(spec, num_blocks)
        wire = torch.full(shape, float("nan")).to(torch_dtype(spec.wire_dtype))
        return self.backend.kv_import(kv, self.index(range(num_blocks)), wire)

    def export(self, kv: KV, blocks: Sequence[int]) -> npt.NDArray[np.float32]:
        """Blocks in the wire layout, as float32: [N, L, P, B, H_kv, D]."""
        wire: npt.NDArray[np.float32] = (
            self.backend.kv_export(kv, self.index(blocks)).to("cpu", torch.float32).numpy()
        )
        return wire


def wire_shape(spec: KVSpec, num_blocks: int) -> tuple[int, ...]:
    """Of `num_blocks` blocks outside of their cache: [N, L, P, B, H_kv, D]."""
    block = (spec.block_size, spec.num_kv_heads, spec.head_size)
    return num_blocks, spec.num_layers, spec.num_planes, *block


def _preferred(claimed: frozenset[int] | None, wanted: int) -> int:
    """`wanted` if claimed, else the smallest that is."""
    return wanted if claimed is None or wanted in claimed else min(claimed)
