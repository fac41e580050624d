"""What a backend states about itself and about the machine."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Head sizes that attention supports; None: any. Not for caches that share values: there
    `kv_alloc` refuses the sizes that it does not support."""
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
