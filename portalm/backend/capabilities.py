"""What a backend states about itself and about the machine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from portalm.backend.kv_cache import KVSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do. Claims are tested; using what is not claimed raises `Unsupported`."""

    device: str = ""
    """The device that the claims are for, where they differ between a backend's devices: for
    example sm_80 (A100)."""
    dtypes: frozenset[str]
    """Data types of weights and activations: names such as "bfloat16"."""
    kv_dtypes: frozenset[str]
    """Data types of keys and values in the cache: float types and names in `SCALED_KV_DTYPES`."""
    head_sizes: frozenset[int] | None = None
    """Supported head sizes of caches that store keys and values; None: any."""
    shared_head_sizes: frozenset[int] | None = None
    """Supported head sizes of caches whose values are part of their keys; None: any."""
    shared_kv_dtypes: frozenset[str] | None = None
    """Data types of caches whose values are part of their keys; None: all of `kv_dtypes`."""
    block_sizes: frozenset[int] | None = None
    """Supported KV block sizes; None: any."""
    features: frozenset[str] = frozenset()
    """Any of sliding_window, soft_cap, alibi, sinks, shared_values (values are part of their keys)
    and batch_invariant (a request's logits do not depend, bit for bit, on the other requests in the
    batch)."""
    quantizations: frozenset[str] = frozenset()
    """Names of `QUANTIZED_FORMATS` that `pack` accepts as they are or rounds to. Also fp8: `pack`
    rounds each row to float8 with a scale of its own, and `linear` rounds the rows of activations
    the same way."""
    static_shapes: bool = False
    """True: every step must be padded to one of `buckets()`. False: a step that fits no captured
    bucket runs uncaptured."""
    measures_memory: bool = False
    """`peak` and `memory` measure what a step allocates on the device. The KV pool is then sized by
    measuring the largest step instead of by a formula."""
    auto_dtype: str | None = None
    """What dtype "auto" means on this device; None: the checkpoint's dtype, if it is claimed."""
    max_steps_in_flight: int = 1
    """1: `to_host` waits for the step. 2: a step may be enqueued while another one runs."""

    def kv_problem(self, spec: KVSpec) -> str | None:
        """Return why a KV cache of this spec is not supported and what to do; None if it is."""
        if spec.shares_values:
            if "shared_values" not in self.features:
                return "values that are part of their keys are not supported: use another device"
            kind, head_sizes = " where values are part of their keys", self.shared_head_sizes
            dtypes = self.kv_dtypes if self.shared_kv_dtypes is None else self.shared_kv_dtypes
        else:
            kind, head_sizes, dtypes = "", self.head_sizes, self.kv_dtypes
        if spec.dtype not in dtypes:
            return (
                f"KV dtype {spec.dtype} is not supported{kind}; supported: {_listed(dtypes)}: "
                f"choose one with --kv-cache-dtype"
            )
        if self.block_sizes is not None and spec.block_size not in self.block_sizes:
            return (
                f"block size {spec.block_size} is not supported; supported: "
                f"{_listed(self.block_sizes)}: choose one with --block-size"
            )
        if head_sizes is not None and spec.head_size not in head_sizes:
            return (
                f"head size {spec.head_size} is not supported{kind}; supported: "
                f"{_listed(head_sizes)}: use another device"
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """What a backend found on this machine, without starting the device."""

    is_available: bool
    summary: str
    """One line: the device if it is usable, else exactly what is missing and how to get it."""
    details: tuple[tuple[str, str], ...] = ()
    """More lines for `portalm doctor`: driver, library and instruction set versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemInfo:
    """Total and free device memory in bytes."""

    total: int
    free: int
    host_shared: bool
    """The device uses the host's memory (a CPU), so that other programs use it too."""


def _listed(values: Collection[int] | Collection[str]) -> str:
    return ", ".join(map(str, sorted(values)))
